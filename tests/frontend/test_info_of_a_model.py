"""`jaxsloth info --model` says of a model's config alone what the built model's training pass is."""

from __future__ import annotations

import json

import pytest
import transformers
import yaml

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.cli import main
from jaxsloth.convert.checkpoint import described_model
from jaxsloth.models.registry import families
from tests.support.small_models import BACKENDS, build
from tests.support.tiny import CONFIG, recipe_values, write_checkpoint, write_rows

# changes of the config, LoRA's settings, implementations asked for; what JAX says.
CASES = {
    "plain": ({}, {}, None, "4 blocks: self_attn: written; mlp: written"),
    "dropout": ({}, {"dropout": 0.1}, None, "4 blocks: self_attn: written; mlp: written"),
    "erf": ({"hidden_act": "gelu"}, {}, None, "4 blocks: self_attn: written; mlp: local vjp (no kernel has erf)"),
    "rank": ({}, {"r": 300}, None, "4 blocks: self_attn: local vjp (has room for ranks of 768 in all, and"),
    "asked": ({}, {}, {"rope": "xla"}, "4 blocks: self_attn: local vjp (rope: xla was asked for); mlp: written"),
    "biases": ({"attention_bias": True}, {"bias": "all"}, None, "4 blocks: self_attn: written; mlp: written"),
    "some": ({}, {"targets": "model.layers.1.*q_proj"}, None, "4 blocks: self_attn: written; mlp: written"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_passes_are_those_of_the_built_model(backend, case):
    changes, lora, asked, expected = CASES[case]
    options = BuildOptions(implementations={"rope": "torch"} if asked and backend == "torch" else asked)
    model, spec, *_ = build(backend, changes, lora=lora, options=options, stir=False)
    if backend == "torch":
        from jaxsloth.torch_backend.written_pass import describe as describe_torch

        real = describe_torch(model.decoder)
    else:
        from jaxsloth.jax_backend.written_pass import describe

        blocks = model.decoder().model.layers
        real = describe(blocks, len(spec.layers) // len(blocks))
        assert real[0].startswith(expected)
    assert load_backend(backend).training_passes(spec, options) == real


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_of_a_config_alone_without_a_line_of_log(tmp_path, capsys, caplog):
    """No weights are there at all."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_act": "gelu"}))
    with caplog.at_level("INFO"):
        assert run("info", "--model", str(tmp_path), "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert run("info", "--model", str(tmp_path)) == 0
        shown = " ".join(capsys.readouterr().out.split())
    assert caplog.messages == []
    assert found["adapters"] == "LoRA r=16 on 28 layers, dropout 0, bias none" and found["layers"] == 4
    assert found["backends"]["jax"]["blocks"] == [CASES["erf"][3]]
    assert found["backends"]["torch"]["blocks"] == [CASES["plain"][3]]
    assert {choice["uses"] for choice in found["backends"].values()} == {"autograd"}
    assert "how its blocks train" in shown and "autograd (written is made" in shown


def test_of_a_recipe(tmp_path, capsys):
    folder, rows = write_checkpoint(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(folder, rows, tmp_path / "out")))
    assert run("info", "--recipe", str(recipe), "--json", "lora.r=300", "implementations.train_pass=fused") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(folder) and "LoRA r=300" in found["adapters"]
    assert (found["backends"]["jax"]["uses"], found["backends"]["jax"]["why"]) == ("written", "as asked for")
    assert found["backends"]["jax"]["blocks"][0].startswith(CASES["rank"][3])
    assert run("info", "--recipe", str(recipe), "--json", "compute=fp8", "dtype=auto") == 0
    found = json.loads(capsys.readouterr().out)
    assert "compute fp8 runs on the torch backend so far" in found["backends"]["jax"]["error"]
    assert "it needs dtype bfloat16; got float32" in found["backends"]["torch"]["error"]


def test_of_every_family(capsys):
    assert run("info", "--families", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(families())
    assert found["llama"]["has"] == [] and found["qwen2"]["has"] == ["biases of q, k, v"]
    assert found["qwen3"]["has"] == ["norms of q and k"] and found["phi3"]["has"] == ["fused projections"]
    assert {"a window of 4096 tokens in 13 of 26 blocks", "soft caps"} <= set(found["gemma2"]["has"])
    assert "2 rotary embeddings" in found["gemma3_text"]["has"]
    for family in found.values():
        assert getattr(transformers, family["architecture"]) and family["covers"]
        trains = {backend: [line.split(": ", 1)[1] for line in lines] for backend, lines in family["trains"].items()}
        assert trains == {backend: ["self_attn: written; mlp: written"] for backend in BACKENDS}
    assert run("info", "--families") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "--model", "x"], "--families lists all of them"),
        (["--model", "/nowhere/at/all"], "no file or folder at /nowhere/at/all"),
        (["lora.r=4"], "lora.r=4 changes a recipe; name it with --recipe"),
        (["--model", "package:none/x.gguf"], "no package 'none' is installed"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert run("info", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_another_family(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    assert run("info", "--model", str(tmp_path)) == 2
    assert str(tmp_path / "config.json") in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*config\.json"):
        described_model(str(tmp_path))
