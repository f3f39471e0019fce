"""Collators of one's own in the native SFTTrainer: transformers' Trainer with the same collator is the judge."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from jaxsloth import SFTConfig, SFTTrainer
from jaxsloth.data.errors import DataError
from tests.frontend.test_trainer import BAR, ROWS, SETTINGS
from tests.support.modules import BACKENDS, their_base
from tests.support.native import logged, native_model, under_their_peft
from tests.support.tiny import write_checkpoint

STEPS = 8
COMMON = {name: value for name, value in SETTINGS.items() if name not in ("max_length", "max_steps")} | {"max_steps": STEPS}


def padded_on_the_left(rows):
    """Learns every second token only, whatever the labels of the rows."""
    longest = max(len(row["input_ids"]) for row in rows)
    made = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        missing, length = longest - len(row["input_ids"]), len(row["input_ids"])
        made["input_ids"].append([0] * missing + list(row["input_ids"]))
        made["attention_mask"].append([0] * missing + [1] * length)
        made["labels"].append([-100] * missing + [token if n % 2 else -100 for n, token in enumerate(row["input_ids"])])
    return {name: torch.tensor(values) for name, values in made.items()}


def as_numpy(rows):
    return {name: value.numpy() for name, value in padded_on_the_left(rows).items()}


COLLATORS: dict[str, Any] = {
    "padded on the left": padded_on_the_left,
    "flattened": DataCollatorWithFlattening(),  # one row a batch; position_ids tell its documents apart
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("collators") / "model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("judge")


@cache
def judged(name: str, checkpoint: str, folder: Path) -> list[dict[str, float]]:
    ours, _ = native_model(checkpoint, "torch")
    theirs = under_their_peft(ours, their_base())
    rows = Dataset.from_list(ROWS["tokens"])
    trainer = transformers.Trainer(
        theirs,
        args=transformers.TrainingArguments(
            str(folder), use_cpu=True, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=3, **COMMON
        ),
        data_collator=COLLATORS[name],
        train_dataset=rows,
        eval_dataset=rows.select(range(6)),
    )
    trainer.train()
    return trainer.state.log_history


def ours(checkpoint, output, backend="torch", collator=None, **changes):
    model, tokenizer = native_model(checkpoint, backend)
    extra = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 3}
    return SFTTrainer(
        model,
        args=SFTConfig(str(output), **COMMON | extra | changes),
        data_collator=collator,
        train_dataset=ROWS["tokens"],
        eval_dataset=ROWS["tokens"][:6],
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COLLATORS)
def test_losses_are_transformers(name, backend, checkpoint, folder, tmp_path):
    history = judged(name, checkpoint, folder)
    trainer = ours(checkpoint, tmp_path, backend, COLLATORS[name])
    trainer.train()
    found = trainer.state.log_history
    for kind in ("loss", "eval_loss"):
        assert len(logged(found, kind)) == len(logged(history, kind)) >= 2
        assert np.abs(logged(found, kind) - logged(history, kind)).max() < BAR


def test_a_collator_decides_what_is_learnt(checkpoint, tmp_path):
    losses = []
    for number, collator in enumerate((None, padded_on_the_left, as_numpy)):
        trainer = ours(checkpoint, tmp_path / str(number), collator=collator, max_steps=2, eval_strategy="no")
        trainer.train()
        losses.append(logged(trainer.state.log_history, "loss"))
    assert np.array_equal(losses[1], losses[2])
    assert np.abs(losses[0] - losses[1]).max() > 1e-3


@pytest.mark.slow
def test_accumulation_and_a_short_last_step(checkpoint, tmp_path):
    """45 rows are 12 steps of 4: the last has one row. The same rows in one batch or two give the same losses."""
    losses = []
    for accumulation in (1, 2):
        shape = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
        changes = {"num_train_epochs": 1, "max_steps": -1, "eval_strategy": "no"}
        trainer = ours(checkpoint, tmp_path / str(accumulation), collator=padded_on_the_left, **shape, **changes)
        trainer.train()
        losses.append(logged(trainer.state.log_history, "loss"))
    assert len(losses[0]) == 12 and np.abs(losses[0] - losses[1]).max() < BAR


BAD: dict[str, tuple[Any, str]] = {
    "no dict": (lambda rows: [1, 2], "must return a dict with input_ids, got list"),
    "no ids": (lambda rows: {"labels": torch.ones(2, 2)}, "with input_ids, got one with labels"),
    "flat": (lambda rows: {"input_ids": torch.ones(3).long()}, r"input_ids \[batch, length\], and their shape is \[3\]"),
    "other shape": (lambda rows: padded_on_the_left(rows) | {"labels": torch.ones(1, 2).long()}, "labels like input_ids"),
    "other fields": (lambda rows: padded_on_the_left(rows) | {"pixel_values": 1}, "returned pixel_values, which nothing"),
    "vocabulary": (lambda rows: {"input_ids": np.full((2, 3), 9000)}, "input_ids outside the model's 260 tokens"),
    "labels": (lambda rows: padded_on_the_left(rows) | {"labels": torch.full((2, 99), -7)}, "must return labels"),
    "all masked": (lambda rows: {"input_ids": np.ones((1, 2), int), "attention_mask": np.zeros((1, 2))}, "without a token"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_collator_may_not_return(name, checkpoint, tmp_path):
    collator, message = BAD[name]
    with pytest.raises(DataError, match=message):
        ours(checkpoint, tmp_path, collator=collator, eval_strategy="no").train()


def test_packing_is_the_collators(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="set packing=False"):
        ours(checkpoint, tmp_path, collator=padded_on_the_left, packing=True)
