"""GGUF of every family, judged by llama.cpp, and by transformers' own reader where it has the architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.convert.check import HARD_TEXTS, check
from jaxsloth.convert.check_readers import READERS
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.gguf_families import family_of
from jaxsloth.convert.gguf_fields import rope_factors
from jaxsloth.convert.gguf_tokenizer import tokenizer_fields
from jaxsloth.convert.gguf_tokenizer_reader import read_tokenizer
from jaxsloth.convert.gguf_types import OUT_TYPES
from jaxsloth.convert.gguf_writer import plan_tensors
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.registry import spec_from_config
from jaxsloth.parity.measure import max_abs
from tests.support.families import FAMILIES, config_of
from tests.support.real_tokenizers import llama3, mistral, qwen
from tests.support.small_models import LLAMA3
from tests.support.sources import examples, first_batch, stream
from tests.support.tiny import with_merge, write_checkpoint

# Of `FAMILIES`, what llama.cpp has otherwise; it takes longrope's long factors from a context of 256 on.
CHANGES = {
    "qwen2": {"use_sliding_window": False},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 256, "max_position_embeddings": 1024},
    "smollm3": {"no_rope_layer_interval": 4},
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "gemma2", "gemma3_text", "phi3")  # Qwen 3's with heads of 128 alone
PROMPTS = ("the duck lays sixteen eggs", "12 + 30  =")
# ggml's GELU is a table in 16 bits.
GELU = {"gemma", "gemma2", "gemma3_text"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def config(family, **changes):
    return config_of(family) | CHANGES.get(family, {}) | changes


def checkpoint(folder, family, **changes):
    # llama.cpp looks for tokens of Phi-3's own in a model that is called so.
    found = with_merge(write_checkpoint(folder / "model", **config(family, **changes)))
    if "rope_parameters" in config(family, **changes):
        file = found / "config.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({key: value for key, value in document.items() if key != "rope_theta"}), encoding="utf-8")
    return found


def run(source, destination, to, **options):
    return convert(plan(str(source), destination, to, Options(**options)))


def tensors(path):
    source = open_checkpoint(path).source
    return {name: np.asarray(source.read(name)) for name in source.names()}


@pytest.mark.parametrize(
    ("outtype", "fused", "up"),
    [("q3_k_m", "Q4_K", "Q3_K"), ("q4_k_m", "Q5_K", "Q4_K"), ("q5_k_m", "Q6_K", "Q5_K"), ("iq4_xs", "IQ4_XS", "IQ4_XS")],
)
def test_fused_projections_take_llama_cpps_types(outtype, fused, up):
    """Phi-3's attn_qkv by the rules of llama-quantize (llama-quant.cpp)."""
    spec = spec_from_config(config("phi3", hidden_size=256, num_attention_heads=16))
    kinds = {tensor.name: tensor.kind for tensor in plan_tensors(spec, OUT_TYPES[outtype])}
    assert (kinds["blk.0.attn_qkv.weight"], kinds["blk.0.ffn_up.weight"]) == (fused, up)


@every_family
def test_llama_cpp_and_transformers_read_what_is_written(family, tmp_path):
    """The F16 file's likeliest tokens are transformers' own; the F32 file's distributions too, and its way back is exact."""
    folder = checkpoint(tmp_path, family)
    found = check(str(folder), str(run(folder, tmp_path / "f16.gguf", "gguf", outtype="f16")), prompts=PROMPTS)
    assert found.misses == () and found.top1 == 1.0
    file = run(folder, tmp_path / "f32.gguf", "gguf", outtype="f32")
    want = READERS["safetensors"].read(folder, None, (), PROMPTS)
    got = READERS["gguf"].read(file, None, (), want.prompts)
    worst = max(np.abs(a - b).max() for a, b in zip(want.log_probs, got.log_probs, strict=True))
    assert worst < (0.02 if family in GELU else 2e-5)
    before, after = tensors(folder), tensors(run(file, tmp_path / "back", "hf", dtype="float32"))
    assert before.keys() == after.keys()
    for name, value in before.items():  # 1 + w rounds
        assert np.abs(after[name] - value).max() <= (2.4e-7 if family in GELU and "norm" in name else 0), name
    back = READERS["safetensors"].read(tmp_path / "back", None, HARD_TEXTS, want.prompts)
    assert max(np.abs(a - b).max() for a, b in zip(want.log_probs, back.log_probs, strict=True)) < 2e-5
    assert back.texts == READERS["safetensors"].read(folder, None, HARD_TEXTS, ()).texts
    if family in READ_BY_TRANSFORMERS:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="f32.gguf", dtype=torch.float32)
        assert type(model).__name__ == config(family)["architectures"][0]
        state = model.state_dict()
        for name, value in before.items():
            assert np.abs(state[name].numpy() - value).max() <= 2.4e-7, name


@pytest.mark.parametrize(
    ("backend", "family"),
    [
        pytest.param(backend, family, marks=[pytest.mark.slow] if backend == "jax" and family != "gemma2" else [])
        for backend in ("torch", "jax")
        for family in FAMILIES
        if family != "mistral"  # a llama to GGUF
    ],
)
def test_both_backends_load_q8_0(backend, family, tmp_path):
    """As transformers computes with the dequantized weights."""
    folder = checkpoint(tmp_path, family)
    file = run(folder, tmp_path / "q8.gguf", "gguf", outtype="q8_0")
    assert (
        tensors(file)["model.layers.1.mlp.down_proj.weight"] != tensors(folder)["model.layers.1.mlp.down_proj.weight"]
    ).any()
    opened = open_checkpoint(file)
    model = load_backend(backend).build(opened.spec(), opened.source, BuildOptions())
    batch = first_batch(stream(examples(2, 258)))
    plain = run(file, tmp_path / "plain", "hf", dtype="float32")
    judge = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager" if family == "gemma2" else None
    )
    valid = batch.segments != 0
    with torch.no_grad():
        want = judge(
            torch.from_numpy(batch.input_ids.astype(np.int64)), torch.from_numpy(valid.astype(np.int64))
        ).logits.numpy()
    assert max_abs(model.logits(batch)[valid], want[valid]) <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("qwen3", {"attention_bias": True}, "no biases in out and qkv"),
        ("gemma", {"tie_word_embeddings": False}, "takes the embedding for the head"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "scales q·k by 0.25, and this model by 0.204"),
        ("gemma2", {"attn_logit_softcapping": None}, "always has soft caps"),
        ("gemma2", {"hidden_activation": "gelu"}, "computes gelu_tanh in the MLP, not gelu"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "never has soft caps"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]},
            "all layers but every",
        ),
        ("phi3", {"hidden_size": 48}, "hidden_size"),
        ("smollm3", {"no_rope_layer_interval": 2}, "rotary positions in layer 1"),
        ("qwen2", {"rope_parameters": LLAMA3}, "no llama3 rope scaling"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "no dynamic rope scaling"),
    ],
)
def test_what_llama_cpp_can_not_compute_is_refused_by_name(family, changes, reason):
    spec = spec_from_config(config(family, **changes))
    with pytest.raises(ValueError, match=f"this {family} model can't be written as GGUF: .*{reason}"):
        family_of(spec)


def test_windows_that_llama_cpp_has_not_bound_the_context(tmp_path):
    planned = plan(str(checkpoint(tmp_path, "mistral", sliding_window=40)), tmp_path / "m.gguf", "gguf")
    assert planned.notes[0].startswith("llama.cpp has no windows in llama models: the file's context is the window's 40 tokens")
    assert open_checkpoint(convert(planned)).spec().max_positions == 40


def test_scaled_frequencies_survive_a_second_file(tmp_path):
    """Llama 3.1's, which come back from a file as factors."""
    folder = checkpoint(tmp_path, "llama", rope_parameters=LLAMA3)
    file = run(folder, tmp_path / "a.gguf", "gguf", outtype="f32")
    again = run(file, tmp_path / "b.gguf", "gguf", outtype="f32")
    want, got = (rope_factors(open_checkpoint(path).spec())["rope_freqs.weight"] for path in (folder, again))
    assert want.max() > 2 and np.abs(want - got).max() < 1e-6


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def pieces_tokenizer(folder, kind):
    """SentencePiece's BPE with Gemma's spaces, or those of Llama 2's first tokenizer.json."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzü'. "[:-1]]
    merges = [("▁", "▁"), ("h", "e"), ("t", "he"), ("▁", "t"), ("▁", "the"), ("▁t", "he"), ("e", "r"), ("he", "r"), ("h", "er")]
    vocab = {text: index for index, text in enumerate(dict.fromkeys([*PIECES, *letters, *(a + b for a, b in merges)]))}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefixed = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": index, "content": text, "special": True} | off for index, text in enumerate(PIECES[:3])]
    document |= {"normalizer": replace if kind == "gemma" else prefixed, "pre_tokenizer": None, "added_tokens": added}
    document["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, "vocab": vocab, "merges": merges}
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    document["decoder"] = {"type": "Sequence", "decoders": back}
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"add_bos_token": False}), encoding="utf-8")


@pytest.mark.parametrize(
    "kind",
    [
        *("gemma", "llama-2"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama-3", "qwen", "mistral v1", "mistral v3", "tekken")),
    ],
)
def test_tokenizers_are_llama_cpps(kind, tmp_path):
    """Token ids of hard texts: transformers' of the folder, llama.cpp's of the file, and ours of the file."""
    made = {"llama-3": llama3, "qwen": qwen, "tekken": lambda: mistral("v3-tekken")}
    made |= {f"mistral {version}": lambda version=version: mistral(version) for version in ("v1", "v3")}
    size = len(made[kind]()) if kind in made else 320
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = write_checkpoint(tmp_path / "model", vocab_size=size, bos_token_id=1, eos_token_id=2, **small)
    if kind in made:
        for file in [*folder.glob("token*"), *folder.glob("chat*")]:
            file.unlink()
        made[kind]().save_pretrained(folder)
    else:
        pieces_tokenizer(folder, kind)
    file = run(folder, tmp_path / "m.gguf", "gguf")
    # transformers' Mistral adds no space behind a special token, where llama.cpp always does: none is in its texts.
    special = {"llama-3": "<|eot_id|>", "qwen": "<|im_end|>", "mistral v1": "", "mistral v3": ""}.get(kind, "<s>")
    texts = (*HARD_TEXTS, "the  other the\nher", "ab12cd  345 7", f"a {special} the {special}".strip())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    want = [list(tokenizer(text).input_ids) for text in texts]
    ours = read_tokenizer(file)
    assert READERS["gguf"].read(file, None, texts, ()).texts == want == [list(ours(text).input_ids) for text in texts]
    assert ours.decode(want[3]).strip() == tokenizer.decode(want[3]).strip() == texts[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer must be none"),
        ({"model": {"type": "Unigram"}}, "model.type must be BPE, got 'Unigram'"),
        ({"model": {"merges": []}}, "must hold at least one merge"),
        ({"model": {"merges": None}}, "must hold at least one merge"),
        ({"model": {"merges": ["a b c"]}}, "must be two tokens, got 'a b c'"),
        ({"model": {"vocab": ["a"]}}, "model.vocab must be an object"),
        ({"added_tokens": [{"content": "a"}]}, "added_tokens must be a list of objects with id and content"),
        ({"model": {"byte_fallback": True}, "pre_tokenizer": {"type": "Whitespace"}}, "SentencePiece's spaces alone"),
    ],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(changes, message, tmp_path):
    folder = with_merge(write_checkpoint(tmp_path / "model"))
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    model = document["model"] | changes.get("model", {})
    file.write_text(json.dumps(document | changes | {"model": model}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        tokenizer_fields(folder, 260, {})
