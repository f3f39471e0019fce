"""GGUF LoRA adapters: what the gguf package reads of ours, back to PEFT to the bit, and llama.cpp applying one."""

from __future__ import annotations

import json

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxsloth import cli
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.gguf_source import unpermute
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.convert.report import describe
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.names import lora_names, trainable_shapes
from jaxsloth.parity.subjects import SMOLLM2
from jaxsloth.transforms import add_lora
from tests.support.tiny import write_checkpoint

Q = "model.layers.1.self_attn.q_proj"


def run(source, destination, to, **options):
    return convert(plan(str(source), destination, to, Options(**options)))


def adapter(folder, base, scale=0.1, **settings):
    spec = add_lora(open_checkpoint(base).spec(), targets=["q_proj", "k_proj", "v_proj", "down_proj"], **settings)
    generator = np.random.Generator(np.random.Philox(3))
    shapes = trainable_shapes(spec)
    write_adapter(
        folder, spec, {name: generator.normal(0, scale, s).astype(np.float32) for name, s in shapes.items()}, str(base)
    )
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("lora") / "base", num_hidden_layers=2)


def test_the_file_says_what_llama_cpp_asks(base, tmp_path):
    """alpha / r is the scaling, rsLoRA's too; A as PEFT has it, B's rows of q and k in llama.cpp's order."""
    folder = adapter(tmp_path / "peft", base, r=4, alpha=8.0, rslora=True)
    reader = gguf.GGUFReader(run(folder, tmp_path / "a.gguf", "gguf-lora", outtype="f32"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 16.0  # 8 / √4 · 4
    stored, found = load_file(folder / "adapter_model.safetensors"), {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(stored) == 16
    a, b = (stored[name] for name in lora_names(Q))
    assert np.array_equal(found["blk.1.attn_q.weight.lora_a"].data, a)
    assert np.array_equal(unpermute(found["blk.1.attn_q.weight.lora_b"].data, 4), b)
    assert not np.array_equal(found["blk.1.attn_q.weight.lora_b"].data, b)
    assert np.array_equal(found["blk.1.attn_v.weight.lora_b"].data, stored[lora_names(Q.replace("q_proj", "v_proj"))[1]])
    assert describe(str(tmp_path / "a.gguf"))["tensors"]["blk.1.attn_q.weight.lora_a"] == {"shape": [4, 64], "dtype": "F32"}


@pytest.mark.parametrize(("outtype", "bar"), [("f32", 0.0), ("f16", 2**-11), ("bf16", 2**-8)])
def test_back_to_peft(outtype, bar, base, tmp_path, capsys):
    folder = adapter(tmp_path / "peft", base, r=4, alpha=8.0)
    run(folder, tmp_path / "a.gguf", "gguf-lora", outtype=outtype)
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "back"), "--to", "peft", "--base", str(base)])
    assert ended.value.code == 0 and "adapter to peft: 16 tensors" in capsys.readouterr().out.replace("\n", " ")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.abs(value - after[name]).max() <= bar * np.abs(value).max()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        want, got = (
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(path))(ids).logits
            for path in (folder, tmp_path / "back")
        )
    assert (want - got).abs().max() <= bar * 8 * want.abs().max()


def test_ranks_may_differ_and_alpha_may_be_left_out(base, tmp_path):
    """llama.cpp divides by each matrix' own rank, and scales by 1 where there is no alpha: merging does the same."""
    generator, wanted = np.random.default_rng(0), {}
    for alpha, name in ((6.0, "with"), (0.0, "without")):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        if alpha:
            writer.add_float32("adapter.lora.alpha", alpha)
        for part, module, rank, out in (("attn_v", "self_attn.v_proj", 2, 32), ("ffn_up", "mlp.up_proj", 3, 128)):
            a, b = (generator.normal(size=shape).astype(np.float32) for shape in ((rank, 64), (out, rank)))
            writer.add_tensor(f"blk.0.{part}.weight.lora_a", a)
            writer.add_tensor(f"blk.0.{part}.weight.lora_b", b)
            wanted[f"model.layers.0.{module}.weight"] = (alpha / rank if alpha else 1.0) * b @ a
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        merged = load_file(run(base, tmp_path / name, "hf", merge=tmp_path / f"{name}.gguf") / "model.safetensors")
        for key, value in load_file(base / "model.safetensors").items():
            assert np.abs(merged[key] - value - wanted.get(key, 0)).max() < 1e-5, key


def test_what_does_not_fit_is_refused(base, tmp_path):
    folder = adapter(tmp_path / "peft", base, r=4, alpha=8.0)
    file = run(folder, tmp_path / "a.gguf", "gguf-lora")
    other = write_checkpoint(tmp_path / "other", num_hidden_layers=1)
    narrow = write_checkpoint(tmp_path / "narrow", num_hidden_layers=2, intermediate_size=96)
    whole = adapter(tmp_path / "whole", base, r=4, alpha=8.0, modules_to_save=("lm_head",))
    there = sorted(path.name for path in tmp_path.iterdir())
    for source, to, options, message in (
        (file, "peft", {}, r"says nothing of its base.*--base"),
        (file, "peft", {"base": str(other)}, r"no place for blk\.1\.attn_q\.weight\.lora_a, .*\(8|no place for blk\.1"),
        (file, "peft", {"base": str(narrow)}, r"down_proj\.lora_A\.weight must have the shape \(4, 96\), got \(4, 128\)"),
        (base, "gguf-lora", {}, r"is no adapter"),
        (folder, "gguf-lora", {"outtype": "q8_0"}, r"outtype of a GGUF adapter must be one of f32, f16, bf16"),
        (folder, "gguf-lora", {"merge": folder}, r"leave --merge out"),
        (whole, "gguf-lora", {}, r"trains lm_head\.weight too; merge it"),
        (file, "hf", {}, r"is an adapter, not a model"),
    ):
        with pytest.raises((CheckpointError, ValueError), match=message):
            run(source, tmp_path / f"out{'.gguf' if to == 'gguf-lora' else ''}", to, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def llama_cpp(model, lora=None):
    """A function prompt -> llama.cpp's greedy continuation."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(model), 256, False
    settings.cpuparams.n_threads = 1
    if lora is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(settings)

    def answer(prompt):
        asked = {"prompt": prompt, "n_predict": 12, "temperature": 0.0}
        return server.handle_completions(asked)["choices"][0]["text"]

    return answer


@pytest.mark.slow
def test_llama_cpp_applies_it_as_a_merge(tmp_path):
    """SmolLM2 with an adapter that changes its answers: llama.cpp's with the adapter's file are transformers' of the merge."""
    base = run(SMOLLM2, tmp_path / "hf", "hf", dtype="float32")
    folder = adapter(tmp_path / "peft", base, scale=0.03, r=8, alpha=16.0)
    model = run(base, tmp_path / "m.gguf", "gguf", outtype="f16")
    plain, applied = llama_cpp(model), llama_cpp(model, run(folder, tmp_path / "a.gguf", "gguf-lora"))
    tokenizer, judge = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    judge = peft.PeftModel.from_pretrained(judge, str(folder)).merge_and_unload()  # type: ignore[operator]
    moved = 0
    for prompt in ("The capital of France is", "def add(a, b):", "Once upon a time", "1, 2, 3, 4,", "Water boils at"):
        ids = tokenizer(prompt, return_tensors="pt")
        answer = judge.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert applied(prompt) == tokenizer.decode(answer), prompt
        moved += applied(prompt) != plain(prompt)
    assert moved >= 3, json.dumps({"moved": moved})
