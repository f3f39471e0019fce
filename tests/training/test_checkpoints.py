"""Checkpoint folders: what is in them, which of them is taken, which stay."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from peft import PeftConfig
from safetensors.numpy import load_file

from jaxsloth.models.registry import spec_from_config
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.checkpoint import TrainerState
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.transforms import add_lora
from tests.support.tiny import CONFIG

SPEC = add_lora(spec_from_config(CONFIG), r=2, alpha=4, targets=["q_proj"])
ADAPTER = initial_adapters(SPEC, "kaiming", 0, lambda name: np.empty(0))
OPTIMIZER = {f"{n}.exp_avg": v + 1 for n, v in ADAPTER.items()} | {"count": np.array(3, np.int64)}


def save(output, step, **fields):
    state = TrainerState(step, "torch", {"seed": 1}, tokens=100, seconds=2.5, **fields)
    return checkpoints.save(output, state, SPEC, ADAPTER, OPTIMIZER, "base")


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
