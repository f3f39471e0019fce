"""Checkpoints of a run: whole or absent, and of no backend.

``checkpoint-{step}/`` holds a PEFT adapter (adapter_model.safetensors, adapter_config.json), the optimizer's state keyed by
PEFT names (state.safetensors), and trainer_state.json. The data position is the step, and everything random is keyed by seed
and step, so nothing else is needed to go on.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxsloth.convert.files import TEMPORARY_PREFIX, remove_folder, whole_folder
from jaxsloth.convert.peft_adapter import read_adapter, write_adapter_files
from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsFile
from jaxsloth.models.spec import ModelSpec

logger = logging.getLogger("jaxsloth.training")

STATE = "state.safetensors"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint knows besides weights. step: optimizer steps done; tokens and seconds (of training): since the run
    began, first_… each part's first step of them; backend and devices: what the last part of the run was trained on."""

    step: int
    backend: str
    recipe: dict[str, Any]
    tokens: int
    seconds: float
    best_step: int | None = None
    best_loss: float | None = None
    devices: int = 1
    first_tokens: int = 0
    first_seconds: float = 0.0


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint read back: the adapter and the optimizer's state as a backend's `load_*` functions take them."""

    state: TrainerState
    adapter: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    folder: Path


def _no_stage(stage: str) -> None:
    del stage


def save(
    output: Path,
    state: TrainerState,
    spec: ModelSpec,
    adapter: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
    base_model: str,
    on_stage: Callable[[str], None] = _no_stage,
) -> Path:
    """Writes ``checkpoint-{step}``; a crash at any moment leaves the checkpoints before it as they were.

    on_stage is told where the save stands ("begun", "adapter", "state", "described", "renamed"): tests kill the process there.
    """
    target = output / f"checkpoint-{state.step}"
    with whole_folder(target, overwrite=True) as folder:
        on_stage("begun")
        write_adapter_files(folder, spec, adapter, base_model)
        on_stage("adapter")
        save_file({name: np.asarray(value) for name, value in optimizer.items()}, folder / STATE)
        on_stage("state")
        (folder / TRAINER_STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        on_stage("described")
    on_stage("renamed")
    return target


def load(folder: Path) -> SavedRun:
    """Reads a checkpoint; CheckpointError where a file is missing, truncated or not what it should be."""
    try:
        state = TrainerState(**json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"{folder / TRAINER_STATE} is not a trainer state: {error}") from error
    _, adapter = read_adapter(folder)
    file = SafetensorsFile(folder / STATE)
    return SavedRun(state, adapter, {name: np.array(file.read(name)) for name in file.names()}, folder)


def steps_saved(output: Path) -> list[int]:
    """The steps of all checkpoint folders, ascending."""
    if not output.is_dir():
        return []
    return sorted(int(match[1]) for entry in output.iterdir() if (match := _NAME.fullmatch(entry.name)))


def latest(output: Path) -> SavedRun | None:
    """The newest checkpoint that is whole; a broken one is passed over with a warning. None where there is none."""
    for step in reversed(steps_saved(output)):
        try:
            return load(output / f"checkpoint-{step}")
        except CheckpointError as error:
            logger.warning("checkpoint-%d can't be read and is passed over: %s", step, error)
    return None


def prune(output: Path, keep: int, best_step: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints; the best one stays."""
    for step in steps_saved(output)[:-keep]:
        if step != best_step:
            remove_folder(output / f"checkpoint-{step}")


def clean(output: Path, resume_step: int) -> None:
    """Removes what a killed save or deletion left behind, and checkpoints after resume_step: those could not be read, and
    would stand in the place of whole ones when the oldest are deleted."""
    for step in steps_saved(output):
        if step > resume_step:
            remove_folder(output / f"checkpoint-{step}")
    for entry in output.glob(f"{TEMPORARY_PREFIX}*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
