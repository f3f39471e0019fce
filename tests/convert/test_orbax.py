"""Orbax trees: read by plain orbax, run as MaxText's and Tunix's published code would run them, and back to the bit."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from jaxsloth import extras
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.orbax_source import OrbaxSource
from jaxsloth.convert.report import describe
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from tests.support.small_models import LLAMA3
from tests.support.tiny import CONFIG, with_merge, write_checkpoint

HEADS, KV_HEADS, HEAD_DIM, LAYERS, EPS = 4, 2, 16, 4, CONFIG["rms_norm_eps"]
LLAMA31 = LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
IDS = np.arange(40)[None] % 260


def run(source, destination, to, **options):
    return convert(plan(str(source), destination, to, Options(**options)))


def tensors(folder):
    source = open_checkpoint(folder).source
    return {name: np.asarray(source.read(name)) for name in source.names()}


def judged(folder):
    """transformers' logits, and its rotary frequencies."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy(), model.model.rotary_emb.inv_freq.numpy()


def close(got, want):
    return np.abs(np.asarray(got) - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("to", ["orbax", "maxtext", "tunix"])
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("float32", {}),
        ("bfloat16", {"tie_word_embeddings": True, "head_dim": 32}),
        ("float16", {"rope_parameters": LLAMA31}),
    ],
    ids=["float32", "tied bfloat16", "float16"],
)
def test_there_and_back_to_the_bit(to, dtype, changes, tmp_path):
    """Also where MaxText divides queries by a root that 16 bits can't take."""
    folder = write_checkpoint(tmp_path / "model", **(changes if to != "tunix" or dtype != "float16" else {}))
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": 1}')
    if dtype != "float32":
        folder = run(folder, tmp_path / "stored", "hf", dtype=dtype)
    written = run(folder, tmp_path / to, to)
    back = run(written, tmp_path / "back", "hf")
    before, after = tensors(folder), tensors(back)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
        assert np.array_equal(value, after[name]), name
    kept = {file.name for file in folder.iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= kept
    for name in kept:
        assert (back / name).read_bytes() == (written / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((folder / "config.json").read_text()) | {"dtype": dtype}
    assert json.loads((back / "config.json").read_text()) == config
    found = describe(str(written))
    assert found["kind"] == "orbax" and found["tied"] == changes.get("tie_word_embeddings", False)


def test_an_array_of_all_layers_is_decompressed_once(tmp_path):
    """Not for each of its layers, which at 8B would be 32 times: MaxText's nine such arrays of four layers each."""

    def hits():
        (found,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/cache/hit_count")
        return found["values"][0]["value"]

    folder = with_merge(write_checkpoint(tmp_path / "model"))
    stacked, want = run(folder, tmp_path / "maxtext", "maxtext"), tensors(folder)
    for to, name in (("hf", "hf"), ("gguf", "m.gguf")):
        before = hits()
        found = tensors(run(stacked, tmp_path / name, to, **({"outtype": "f32"} if to == "gguf" else {})))
        assert hits() - before >= 9 * 3
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[name], value) for name, value in want.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model")


def test_plain_orbax_reads_what_the_documents_name(folder, tmp_path):
    written, want = run(folder, tmp_path / "orbax", "orbax", shard_bytes=200_000), tensors(folder)
    tree = ocp.StandardCheckpointer().restore(written / "params")
    assert np.array_equal(tree["model"]["embed_tokens"]["embedding"], want["model.embed_tokens.weight"])
    layer = tree["model"]["layers"]["2"]
    assert np.array_equal(layer["self_attn"]["k_proj"]["kernel"], want["model.layers.2.self_attn.k_proj.weight"].T)
    assert np.array_equal(layer["mlp"]["down_proj"]["kernel"], want["model.layers.2.mlp.down_proj.weight"].T)
    assert np.array_equal(layer["input_layernorm"]["scale"], want["model.layers.2.input_layernorm.weight"])
    assert np.array_equal(tree["lm_head"]["kernel"], want["lm_head.weight"].T)
    assert len(jax.tree.leaves(tree)) == len(want)
    mesh = jax.sharding.NamedSharding(jax.make_mesh((1,), ("model",)), jax.sharding.PartitionSpec("model"))
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh), tree)
    placed = ocp.StandardCheckpointer().restore(written / "params", wanted)
    assert placed["lm_head"]["kernel"].sharding == mesh and np.array_equal(
        placed["lm_head"]["kernel"], tree["lm_head"]["kernel"]
    )
    files = [file for file in (written / "params").rglob("d/*") if file.stat().st_size > 1000]
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 400_000


def test_an_adapter_is_merged_and_a_quantized_source_is_dequantized(folder, tmp_path):
    quantized = run(folder, tmp_path / "bnb", "bnb-4bit")
    one = tensors(run(run(quantized, tmp_path / "orbax", "orbax", dtype="float32"), tmp_path / "one", "hf"))
    other = tensors(run(quantized, tmp_path / "other", "hf", dtype="float32"))
    assert all(np.array_equal(value, one[name]) for name, value in other.items())


def causal(scores):
    return jnp.where(np.tril(np.ones((IDS.shape[1],) * 2, bool)), scores, -1e30)


def attend(query, key, value):
    """[B, T, heads, head_dim] of queries that carry their scale."""
    key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(causal(jnp.einsum("bthd,bshd->bhts", query, key))), value)


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * scale


def halves(x, frequencies):
    """MaxText's RotaryEmbedding and Tunix's apply_rope: the first half of a head's values turns with the second."""
    angles = np.arange(x.shape[1])[:, None, None] * frequencies
    one, two = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((one * np.cos(angles) - two * np.sin(angles), two * np.cos(angles) + one * np.sin(angles)), -1)


def neighbours(x, frequencies):
    """MaxText's LLaMARotaryEmbedding: each even value turns with the odd one behind it."""
    angles = np.repeat(np.arange(x.shape[1])[:, None, None] * frequencies, 2, axis=-1)
    odd = np.arange(x.shape[-1]) % 2
    shifted = jnp.where(odd, jnp.roll(x, 1, -1), jnp.roll(x, -1, -1))
    return x * np.cos(angles) + shifted * np.sin(angles) * np.where(odd, 1, -1)


@pytest.mark.parametrize(("changes", "rope"), [({}, halves), ({"rope_parameters": LLAMA31}, neighbours)], ids=["", "llama3"])
def test_maxtext_s_decoder_runs_it(changes, rope, tmp_path):
    """Its LlamaDecoderLayer, scanned over axis 1: attention divides nothing, the queries' kernel has been divided."""
    folder = write_checkpoint(tmp_path / "model", **changes)
    want, frequencies = judged(folder)
    tree = ocp.PyTreeCheckpointer().restore(run(folder, tmp_path / "maxtext", "maxtext") / "0" / "items")["params"]["params"]
    layers, shapes = tree["decoder"]["layers"], {"query": (64, LAYERS, HEADS, HEAD_DIM), "out": (HEADS, LAYERS, HEAD_DIM, 64)}
    assert {name: layers["self_attention"][name]["kernel"].shape for name in shapes} == shapes
    x = tree["token_embedder"]["embedding"][IDS]
    for index in range(LAYERS):
        layer = jax.tree.map(lambda leaf, index=index: jnp.take(leaf, index, axis=1), layers)
        own, mlp = layer["self_attention"], layer["mlp"]
        y = rms(x, layer["pre_self_attention_layer_norm"]["scale"])
        query, key, value = (jnp.einsum("btd,dnh->btnh", y, own[name]["kernel"]) for name in ("query", "key", "value"))
        y = attend(rope(query, frequencies), rope(key, frequencies), value)
        x = x + jnp.einsum("btnh,nhd->btd", y, own["out"]["kernel"])
        y = rms(x, layer["post_self_attention_layer_norm"]["scale"])
        x = x + (jax.nn.silu(y @ mlp["wi_0"]["kernel"]) * (y @ mlp["wi_1"]["kernel"])) @ mlp["wo"]["kernel"]
    got = rms(x, tree["decoder"]["decoder_norm"]["scale"]) @ tree["decoder"]["logits_dense"]["kernel"]
    assert close(got, want)


class Array(nnx.Module):
    def __init__(self, *shape, name="w"):
        setattr(self, name, nnx.Param(jnp.zeros(shape)))


class TunixLayer(nnx.Module):
    """The parameters of tunix.models.llama3's DecoderLayer, in its shapes."""

    def __init__(self, hidden=64, width=128):
        kv = hidden, KV_HEADS, HEAD_DIM
        self.attn = nnx.Module()
        self.attn.q_proj, self.attn.k_proj, self.attn.v_proj = Array(hidden, HEADS, HEAD_DIM), Array(*kv), Array(*kv)
        self.attn.o_proj = Array(HEADS, HEAD_DIM, hidden)
        self.mlp = nnx.Module()
        self.mlp.gate_proj, self.mlp.up_proj = (Array(hidden, width, name="kernel") for _ in range(2))
        self.mlp.down_proj = Array(width, hidden, name="kernel")
        self.input_layernorm, self.post_attention_layernorm = Array(hidden), Array(hidden)

    def __call__(self, x, frequencies):
        y = rms(x, self.input_layernorm.w[...])
        query, key, value = (
            jnp.einsum("btd,dnh->btnh", y, part.w[...]) for part in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj)
        )
        y = attend(halves(query, frequencies) * HEAD_DIM**-0.5, halves(key, frequencies), value)
        x = x + jnp.einsum("btnh,nhd->btd", y, self.attn.o_proj.w[...])
        y = rms(x, self.post_attention_layernorm.w[...])
        return (
            x
            + (jax.nn.silu(y @ self.mlp.gate_proj.kernel[...]) * (y @ self.mlp.up_proj.kernel[...]))
            @ (self.mlp.down_proj.kernel[...])
        )


class Tunix(nnx.Module):
    def __init__(self):
        self.embedder, self.final_norm = Array(260, 64, name="input_embedding"), Array(64)
        self.layers, self.lm_head = nnx.List([TunixLayer() for _ in range(LAYERS)]), Array(64, 260)

    def __call__(self, ids, frequencies):
        x = self.embedder.input_embedding[...][ids]
        for layer in self.layers:
            x = layer(x, frequencies)
        return rms(x, self.final_norm.w[...]) @ self.lm_head.w[...]


def test_tunix_s_model_takes_it_and_gives_it(folder, tmp_path):
    """As tunix.models.automodel restores a state: by its own nnx.State. And a checkpoint that its trainer saves comes back."""
    want, frequencies = judged(folder)
    written = run(folder, tmp_path / "tunix", "tunix")
    model = Tunix()
    nnx.update(model, ocp.StandardCheckpointer().restore(written / "state", nnx.state(model)))
    assert close(model(IDS, frequencies), want)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "trained" / "7" / "model_params", nnx.state(model))
    with pytest.raises(CheckpointError, match=r"no config.json; MaxText's and Tunix's checkpoints have none"):
        open_checkpoint(tmp_path / "trained")
    shutil.copyfile(folder / "config.json", tmp_path / "trained" / "config.json")
    back = tensors(run(tmp_path / "trained", tmp_path / "back", "hf"))
    assert all(np.array_equal(value, back[name]) for name, value in tensors(folder).items())


def test_a_conversion_that_is_stopped_leaves_nothing(folder, tmp_path):
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan(str(folder), tmp_path / "out", "orbax"), stop)
    assert len(seen) == 5 and not list(tmp_path.iterdir())


def test_what_does_not_fit_is_named(folder, tmp_path, monkeypatch):
    written = run(folder, tmp_path / "orbax", "orbax")
    config = json.loads((written / "config.json").read_text())

    def refused(message, **changes):
        with pytest.raises(CheckpointError, match=message):
            (written / "config.json").write_text(json.dumps(config | changes))
            open_checkpoint(written).spec()

    refused(r"the checkpoint lacks model\.layers\.4\.", num_hidden_layers=5)
    refused(r"no place for 9 of the tree's arrays: model\.layers\.3\.", num_hidden_layers=3)
    refused(r"_METADATA: model\.layers\.0\.mlp\.\w+\.kernel must have the shape", intermediate_size=96)
    refused(r"no place for 1 of the tree's arrays: lm_head.kernel", tie_word_embeddings=True)
    (written / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(written).source
    assert isinstance(source, OrbaxSource) and source.layout == "orbax"
    shutil.rmtree(written / "params" / "ocdbt.process_0" / "d")
    with pytest.raises(CheckpointError, match=r"can't be (read|opened)"):
        tensors(written)
    (written / "params" / "_METADATA").write_text('{"tree_metadata": []}')
    with pytest.raises(CheckpointError, match="tree_metadata must be an object of at least one array"):
        open_checkpoint(written)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs orbax, which is not installed; run: pip install 'jaxsloth\[orbax\]'"):
        run(folder, tmp_path / "out", "orbax")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def in_maxtexts(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("base") / "maxtext", "maxtext")


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
GEMMA = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


@pytest.mark.parametrize(
    ("changes", "maxtext", "tunix"),
    [
        (
            GEMMA,
            "maxtext's trees are known here of .*, got a gemma model",
            "tunix's trees are known here of .*, got a gemma model",
        ),
        ({"attention_bias": True}, r"maxtext's tree .* no place for 16 .*q_proj\.bias", r"tunix's tree .* no place for 16 "),
        ({"mlp_bias": True}, r"no place for 12 .*gate_proj\.bias", r"no place for 12 .*gate_proj\.bias"),
        ({"hidden_act": "gelu"}, r"computes silu in the MLP, and this model gelu \(hidden_act\)", "computes silu"),
        (
            MISTRAL | {"sliding_window": 40},
            "has no windows, and this model sees 40 of 256 .* sliding_window to null",
            "no windows",
        ),
        (MISTRAL | {"sliding_window": 256}, None, None),
        (
            {"rope_parameters": LLAMA31},
            None,
            r"no scaled rotary frequencies, and this model's are \(llama3\).* rope_type to default",
        ),
        (
            {"rope_parameters": LLAMA31 | {"factor": 32.0}},
            "Llama 3.1's .*, and this model's is factor 32, low",
            "no scaled rotary",
        ),
        ({"rope_parameters": YARN}, "and this model's is yarn", r"this model's are \(yarn\)"),
    ],
    ids=["gemma", "attention bias", "mlp bias", "gelu", "window", "window of all", "llama3.1", "llama3.2", "yarn"],
)
def test_what_a_layouts_decoder_has_not_is_refused_by_name(changes, maxtext, tunix, in_maxtexts, tmp_path):
    """Before the first byte, and where such a tree is read with such a config.json too; plain orbax takes all."""
    folder = write_checkpoint(tmp_path / "model", **changes)
    for to, message in (("maxtext", maxtext), ("tunix", tunix)):
        if message is None:
            assert plan(str(folder), tmp_path / "out", to).tensors
        else:
            with pytest.raises(CheckpointError, match=message):
                plan(str(folder), tmp_path / "out", to)
    assert plan(str(folder), tmp_path / "out", "orbax").tensors
    shutil.copyfile(folder / "config.json", in_maxtexts / "config.json")
    if maxtext is not None:
        with pytest.raises(CheckpointError, match=maxtext):
            open_checkpoint(in_maxtexts)
