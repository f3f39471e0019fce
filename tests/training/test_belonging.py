"""A checkpoint knows what it belongs to: words, base, template, recipe. A difference has a name, and a flag that allows it."""

from __future__ import annotations

import json
import logging
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsloth.backend import BACKENDS
from jaxsloth.convert.checkpoint import find_checkpoint
from jaxsloth.convert.digest import base_digest
from jaxsloth.recipe import Recipe
from jaxsloth.training.fingerprints import KINDS, ForeignCheckpointError
from jaxsloth.training.run import RunError, make_plan, train
from tests.support.tiny import tiny_recipe


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A run of two steps of three, with a model and rows of its own, to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny.model, folder / "model")
    shutil.copy(tiny.rows, folder / "rows.jsonl")
    train(recipe_of(folder), stop_after=2, quiet=True)
    return folder


def recipe_of(folder, backend="torch", **changes) -> Recipe:
    return tiny_recipe(folder / "model", folder / "rows.jsonl", folder / "run", steps=3, backend=backend, **changes)


@pytest.fixture
def run(begun, tmp_path, monkeypatch):
    """The run at the very path that it began at."""
    kept = tmp_path / "kept"
    shutil.copytree(begun, kept)
    yield begun
    shutil.rmtree(begun)
    shutil.copytree(kept, begun)


def resumed(folder, *anyway, **changes):
    recipe = recipe_of(folder, **changes)
    return make_plan(recipe, find_checkpoint(recipe.model), resume=True, resume_anyway=anyway)


def lines(folder, change):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")


def new_words(folder):
    lines(folder, lambda old: [old[0].replace("duck", "goose").replace("eggs", "egg"), *old[1:-1], old[-1].replace("a", "e")])


def one_row_less(folder):
    lines(folder, lambda old: old[:-1])


def another_order(folder):
    lines(folder, lambda old: [old[1], old[0], *old[2:]])


def trained_base(folder):
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] += np.float32(1e-3)
    save_file(weights, file)


def another_theta(folder):
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 20000.0}))


def another_template(folder):
    for file in (folder / "model").iterdir():
        if file.name in ("tokenizer_config.json", "chat_template.jinja"):
            file.write_text(file.read_text().replace("':'", "'-'").replace("a:", "a-"))


def move_first(file, part):
    """Of the same shapes, as another run's would be."""
    values = load_file(file)
    name = next(name for name in values if part in name)
    save_file(values | {name: values[name] + np.float32(0.5)}, file)


def another_adapter(folder):
    move_first(folder / "run" / "checkpoint-2" / "adapter_model.safetensors", "lora_A")


def other_moments(folder):
    move_first(folder / "run" / "checkpoint-2" / "state.safetensors", "exp_avg_sq")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "kinds", "message"),
    [
        (new_words, ("data",), r"the tokens of the rows have changed \(\d+ -> \d+ in all\); .*: --resume-anyway data"),
        (one_row_less, ("data",), r"the number of rows has changed \(22 -> 21\)"),
        (another_order, ("data",), "the order of the rows has changed"),
        (trained_base, ("base",), "the base's weights or config.json have changed .*: --resume-anyway base"),
        (another_theta, ("base",), "the base's weights or config.json have changed"),
        (another_adapter, ("files",), r"adapter_model.safetensors holds other values than .*: --resume-anyway files"),
        (other_moments, ("files",), r"state.safetensors holds other values than the checkpoint was saved with"),
        (another_template, ("template", "data"), "the chat template or its special tokens have changed .*anyway template"),
    ],
)
def test_what_has_changed_is_named_and_allowed_by_its_flag(run, backend, change, kinds, message):
    change(run)
    with pytest.raises(ForeignCheckpointError, match=message):
        resumed(run, backend=backend)
    others = [kind for kind in KINDS if kind not in kinds]
    with pytest.raises(ForeignCheckpointError, match=message):
        resumed(run, *others, backend=backend)
    plan = resumed(run, *kinds, backend=backend)
    assert plan.resume.state.step == 2


def test_a_changed_recipe_and_its_flag(run):
    with pytest.raises(RunError, match=r"(?s)seed: 11 -> 12.*--resume-anyway recipe"):
        resumed(run, seed=12)
    assert resumed(run, "recipe", seed=12).resume.state.step == 2
    file = run / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace("seed: 11", "seed: 12"))  # the checkpoint's own recipe still says 11
    with pytest.raises(RunError, match=r"seed: 11 -> 12"):
        resumed(run, seed=12)


def test_an_adapter_of_another_alpha(run):
    file = run / "run" / "checkpoint-2" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 16.0}))
    with pytest.raises(ForeignCheckpointError, match=r"lora_alpha must be what the run trains with, 8.0, got 16.0"):
        resumed(run)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_an_adapter_of_several_ranks_or_alphas(run, name):
    """Trained by PEFT elsewhere; a run has one of each."""
    file = run / "run" / "checkpoint-2" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: {"q_proj": 2}}))
    with pytest.raises(ForeignCheckpointError, match=rf"{name} must be what the run trains with, {{}}, got {{'q_proj': 2"):
        resumed(run)


def test_old_checkpoints_and_other_versions_only_warn(run, caplog):
    file = run / "run" / "checkpoint-2" / "fingerprints.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"versions": saved["versions"] | {"numpy": "1.0"}}))
    with caplog.at_level(logging.WARNING):
        assert resumed(run).resume.state.step == 2
    assert f"trained with other versions: numpy 1.0 -> {np.__version__}" in caplog.text
    del saved["files"]  # it was saved before they were noted
    file.write_text(json.dumps(saved))
    another_adapter(run)
    assert resumed(run).resume.state.step == 2
    file.unlink()
    with caplog.at_level(logging.WARNING):
        assert resumed(run).resume.state.step == 2
    assert "checkpoint-2 has no fingerprints.json" in caplog.text


@pytest.mark.parametrize(
    ("anyway", "resume", "message"), [(("words",), True, "got 'words'"), (("data",), False, "give --resume")]
)
def test_flags_that_make_no_sense(run, anyway, resume, message):
    recipe = recipe_of(run)
    with pytest.raises(ValueError, match=message):
        make_plan(recipe, find_checkpoint(recipe.model), resume=resume, resume_anyway=anyway)


def test_a_digest_is_cheap_and_does_not_mind_the_files_cut(tmp_path, tiny):
    """The same tensors in one file or in two, in well under two seconds; any tensor's change shows."""
    generator = np.random.Generator(np.random.Philox(1))
    block = generator.standard_normal((1024, 1024)).astype(np.float32)
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": block for n in range(16)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny.model / "config.json", tmp_path / name)
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    half = dict(list(tensors.items())[:8])
    rest = {name: value for name, value in tensors.items() if name not in half}
    save_file(half, tmp_path / "two" / "a.safetensors")
    save_file(rest, tmp_path / "two" / "b.safetensors")
    index = {"weight_map": dict.fromkeys(half, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    begin = time.process_time()
    first = base_digest(find_checkpoint(str(tmp_path / "one")))
    assert time.process_time() - begin < 1.0
    assert base_digest(find_checkpoint(str(tmp_path / "two"))) == first
    changed = dict(tensors)
    changed["model.layers.7.mlp.up_proj.weight"] = block + np.float32(1e-3)
    save_file(changed, tmp_path / "one" / "model.safetensors")
    assert base_digest(find_checkpoint(str(tmp_path / "one"))) != first
