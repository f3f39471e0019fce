"""A user's mistakes: each a clear error before the first step, and no file touched."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsloth.backend import BACKENDS, BackendUnavailableError
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.errors import DataError
from jaxsloth.recipe import RecipeError, load_recipe
from jaxsloth.training.run import RunError, train
from tests.support.tiny import recipe_values

UP = "model.layers.2.mlp.up_proj.weight"


def refuse(recipe, output, error, match, **arguments):
    with pytest.raises(error, match=match):
        train(recipe, quiet=True, **arguments)
    assert not output.exists()


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("lora.rank=8", r"lora\.rank: unknown key"),
        ("lora.r=-1", r"lora\.r must be greater than 0, got -1"),
        ("epochs=2", "exactly one of steps and epochs"),
        ("backend=tensorflow", "'torch' or 'jax'"),
    ],
)
def test_a_recipe_that_is_wrong_in_itself(tiny, tmp_path, override, match):
    output = tmp_path / "run"
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_values(tiny.model, tiny.rows, output)))
    with pytest.raises(RecipeError, match=match):
        load_recipe(file, [override])
    assert not output.exists()


def test_targets_that_match_nothing(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path / "run", lora={"r": 4, "targets": ["q_proj", "qkv"]})
    refuse(recipe, tmp_path / "run", ValueError, r"'qkv' matches no linear layer; the layers end in .*'q_proj'")


def test_data_that_is_empty(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n")
    recipe = tiny.recipe(tmp_path / "run", data={"path": str(rows)})
    refuse(recipe, tmp_path / "run", DataError, "holds no rows")


def test_a_row_that_is_too_long(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path / "run", data={"path": str(tiny.rows), "max_length": 30})
    refuse(recipe, tmp_path / "run", DataError, r"rows are longer than data\.max_length=30: row \d+ \(\d+ tokens\)")


def test_rows_of_which_nothing_is_learnt(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = tiny.rows.read_text().splitlines()
    lines[3] = json.dumps({"prompt": "why? " * 20, "completion": "so"})
    rows.write_text("\n".join(lines) + "\n")
    recipe = tiny.recipe(tmp_path / "run", data={"path": str(rows), "max_length": 64, "truncation": True})
    refuse(recipe, tmp_path / "run", DataError, r"all labels masked.*: rows 3\.")


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(tiny.model, tmp_path / "model")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_are_not_finite(tiny, model, tmp_path, backend, quantization, value):
    weights = load_file(model / "model.safetensors")
    weights[UP][5, 7] = value
    save_file(weights, model / "model.safetensors")
    recipe = tiny.recipe(tmp_path / "run", model=str(model), backend=backend, quantization=quantization)
    refuse(recipe, tmp_path / "run", ValueError, rf"{UP}.*NaN")


def test_weights_that_are_truncated(tiny, model, tmp_path):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    recipe = tiny.recipe(tmp_path / "run", model=str(model))
    refuse(recipe, tmp_path / "run", CheckpointError, rf"{file} is not a whole safetensors file")


def test_weights_of_another_shape(tiny, model, tmp_path):
    weights = load_file(model / "model.safetensors")
    weights[UP] = weights[UP][:, :60].copy()
    save_file(weights, model / "model.safetensors")
    recipe = tiny.recipe(tmp_path / "run", model=str(model))
    refuse(recipe, tmp_path / "run", CheckpointError, rf"model.safetensors: tensor {UP} .*\(128, 64\).*\(128, 60\)")


def test_a_tensor_that_is_missing(tiny, model, tmp_path):
    weights = load_file(model / "model.safetensors")
    del weights[UP]
    save_file(weights, model / "model.safetensors")
    recipe = tiny.recipe(tmp_path / "run", model=str(model))
    refuse(recipe, tmp_path / "run", CheckpointError, f"lacks {UP}")


def test_an_architecture_that_is_not_known(tiny, model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    recipe = tiny.recipe(tmp_path / "run", model=str(model))
    refuse(recipe, tmp_path / "run", ValueError, "MambaForCausalLM; supported: .*LlamaForCausalLM")


def test_no_checkpoint_there(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path / "run", model=str(tmp_path / "nowhere"))
    refuse(recipe, tmp_path / "run", CheckpointError, "no file or folder at .*nowhere")


@pytest.mark.parametrize(("backend", "package"), [("jax", "flax"), ("torch", "torch")])
def test_a_backend_that_is_not_installed(tiny, tmp_path, monkeypatch, backend, package):
    from jaxsloth import extras as module

    there = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else there(name))
    recipe = tiny.recipe(tmp_path / "run", backend=backend)
    match = rf"needs {package}.*jaxsloth\[{backend}\]"
    refuse(recipe, tmp_path / "run", BackendUnavailableError, match)


def test_an_implementation_that_can_not_run(tiny, tmp_path):
    recipe = tiny.recipe(tmp_path / "run", implementations={"rms_norm": "triton"})
    refuse(recipe, tmp_path / "run", Exception, "rms_norm.*triton")


def test_nothing_to_resume(tiny, tmp_path):
    refuse(tiny.recipe(tmp_path / "run"), tmp_path / "run", RunError, "nothing to resume", resume=True)


def test_stopping_before_the_first_step(tiny, tmp_path):
    refuse(tiny.recipe(tmp_path / "run"), tmp_path / "run", RunError, "at least 1, got 0", stop_after=0)


@pytest.fixture
def finished(tiny, tmp_path):
    output = tmp_path / "run"
    train(tiny.recipe(output, steps=3), stop_after=2, quiet=True)
    return output


def test_an_output_folder_that_holds_another_run_or_a_changed_one(tiny, finished, contents):
    before = contents(finished)
    with pytest.raises(RunError, match="holds another run; go on with --resume"):
        train(tiny.recipe(finished, steps=3), quiet=True)
    changed = tiny.recipe(finished, steps=3, seed=12, optimizer={"learning_rate": 0.25, "weight_decay": 0.1})
    with pytest.raises(RunError) as refusal:
        train(changed, resume=True, quiet=True)
    assert "optimizer.learning_rate: 0.005 -> 0.25\n  seed: 11 -> 12" in str(refusal.value)
    assert contents(finished) == before


def test_a_checkpoint_of_another_model(tiny, finished, contents):
    file = finished / "checkpoint-2" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != name}, file)
    before = contents(finished)
    with pytest.raises(ValueError, match=f"checkpoint-2 lacks {name}"):
        train(tiny.recipe(finished, steps=3), resume=True, quiet=True, resume_anyway=("files",))
    assert contents(finished) == before


def test_an_output_folder_that_holds_something_else(tiny, tmp_path, contents):
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    for resume, match in ((False, "holds another run"), (True, "not a run's folder")):
        with pytest.raises(RunError, match=match):
            train(tiny.recipe(output), resume=resume, quiet=True)
    assert contents(output) == {"thesis.txt": b"years of work"}
