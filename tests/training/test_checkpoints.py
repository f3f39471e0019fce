"""Checkpoint folders: what is in them, which of them is taken, which stay."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from peft import PeftConfig
from safetensors.numpy import load_file, save_file

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.registry import spec_from_config
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.checkpoint import TrainerState
from jaxsloth.training.fingerprints import ForeignCheckpointError
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.transforms import add_lora
from tests.support.tiny import CONFIG

SPEC = add_lora(spec_from_config(CONFIG), r=2, alpha=4, targets=["q_proj"])
ADAPTER = initial_adapters(SPEC, "kaiming", 0, lambda name: np.empty(0))
MOMENTS = {f"{n}.{moment}": v + 1 for n, v in ADAPTER.items() for moment in ("exp_avg", "exp_avg_sq")}
OPTIMIZER = MOMENTS | {"count": np.array(3, np.int64)}


def save(output, step, **fields):
    state = TrainerState(step, "torch", {"seed": 1}, tokens=100, seconds=2.5, **fields)
    return checkpoints.save(output, state, SPEC, ADAPTER, MOMENTS | {"count": np.array(step, np.int64)}, "base")


def test_a_checkpoint_comes_back_as_it_went(tmp_path):
    folder = save(tmp_path, 3, best_step=2, best_loss=1.25)
    assert folder == tmp_path / "checkpoint-3"
    back = checkpoints.load(folder)
    assert back.state == TrainerState(3, "torch", {"seed": 1}, 100, 2.5, 2, 1.25)
    for found, expected in ((back.adapter, ADAPTER), (back.optimizer, OPTIMIZER)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
    assert PeftConfig.from_pretrained(str(folder)).peft_type == "LORA"
    assert load_file(folder / "state.safetensors")["count"] == 3


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "state.safetensors", "trainer_state.json", "adapter_config.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog, file, damage):
    save(tmp_path, 3)
    broken = save(tmp_path, 10) / file
    if damage == "cut":
        broken.write_bytes(broken.read_bytes()[:-7])
    else:
        broken.unlink()
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.state.step == 3
    assert "checkpoint-10" in caplog.text


def test_the_newest_is_the_one_of_the_highest_step_and_leftovers_are_no_checkpoints(tmp_path):
    assert checkpoints.latest(tmp_path / "absent") is None
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / ".tmp-checkpoint-200-99").mkdir()
    (tmp_path / ".tmp-checkpoint-9-old-99").mkdir()
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    assert newest.state.step == 100
    checkpoints.clean(tmp_path, 100)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def test_a_broken_checkpoint_never_takes_a_whole_one_s_place(tmp_path):
    save(tmp_path, 10)
    (save(tmp_path, 20) / "state.safetensors").write_bytes(b"")
    checkpoints.clean(tmp_path, 10)
    save(tmp_path, 15)
    checkpoints.prune(tmp_path, 1, None)
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert found.state.step == 15


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, None, [4, 5]), (1, 2, [2, 5]), (2, 5, [4, 5]), (9, None, [1, 2, 3, 4, 5])]
)
def test_the_newest_and_the_best_stay(tmp_path, keep, best, left):
    for step in range(1, 6):
        save(tmp_path, step)
    checkpoints.prune(tmp_path, keep, best)
    assert checkpoints.steps_saved(tmp_path) == left


@pytest.mark.parametrize("stage", ["begun", "adapter", "state", "described"])
def test_a_save_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path, stage):
    save(tmp_path, 1)

    def fail(now):
        if now == stage:
            raise OSError("no space left on device")

    state = TrainerState(2, "torch", {}, 0, 0.0)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(tmp_path, state, SPEC, ADAPTER, OPTIMIZER, "base", on_stage=fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


def rewrite(folder, name, change):
    """One of a checkpoint's files, changed: JSON as a dict, tensors by name."""
    file = folder / name
    if name.endswith(".json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        save_file(load_file(file) | change, file)


Q = next(iter(ADAPTER))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("trainer_state.json", {"step": 2}, "step must be the folder's, 3, got 2"),
        ("state.safetensors", {"count": np.array(2, np.int64)}, "Adam's count must be the step, 3, got 2"),
        ("state.safetensors", {"count": np.array([3], np.int64)}, r"count must be an integer, got int64 of the shape \(1,\)"),
        ("state.safetensors", {f"{Q}.exp_avg": np.array(0.5, np.float32)}, r"exp_avg must have the shape .* of the shape \(\)"),
        ("state.safetensors", {f"{Q}.exp_avg_sq": np.zeros((1, 64), np.float32)}, r"exp_avg_sq must have the shape"),
        ("state.safetensors", {f"{Q}.exp_avg": np.full_like(ADAPTER[Q], np.nan)}, "exp_avg must be finite"),
        ("adapter_config.json", {"r": 4}, "adapter_config.json says rank 4, and .*lora_A.weight has the shape"),
    ],
)
def test_files_that_contradict_each_other_are_no_broken_ones(tmp_path, name, change, message):
    """An older checkpoint is not taken in silence."""
    save(tmp_path, 2)
    rewrite(save(tmp_path, 3), name, change)
    with pytest.raises(ForeignCheckpointError, match=message):
        checkpoints.latest(tmp_path)


def test_a_float16_run_skips_steps(tmp_path):
    rewrite(save(tmp_path, 3), "state.safetensors", {"count": np.array(1, np.int64), "loss_scale": np.array(2.0, np.float32)})
    assert checkpoints.latest(tmp_path).state.step == 3


def test_where_no_checkpoint_is_whole_nothing_begins_again(tmp_path):
    (save(tmp_path, 3) / "trainer_state.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint that can be read.*trainer_state.json must hold an object"):
        checkpoints.latest(tmp_path)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_links_and_files_in_a_checkpoint_s_place(tmp_path, kind):
    whole = save(tmp_path / "elsewhere", 3)
    save(tmp_path, 2)
    place = tmp_path / "checkpoint-3"
    place.symlink_to(whole) if kind == "link" else place.write_text("x")
    with pytest.raises(ForeignCheckpointError, match=f"checkpoint-3 must be a checkpoint's folder, and is a {kind}"):
        checkpoints.latest(tmp_path)
    checkpoints.prune(tmp_path, 1, None)
    checkpoints.clean(tmp_path, 2)
    assert place.exists() and whole.is_dir() and checkpoints.steps_saved(tmp_path) == [2]
