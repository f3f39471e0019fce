"""Checkpoints of a run: whole or absent, and of no backend.

``checkpoint-{step}/`` holds a PEFT adapter (adapter_model.safetensors, adapter_config.json), the optimizer's state keyed by
PEFT names (state.safetensors), and trainer_state.json. The data position is the step, and everything random is keyed by seed
and step, so nothing else is needed to go on.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from safetensors.numpy import save_file

from jaxsloth.convert.files import TEMPORARY_PREFIX, remove_folder, whole_folder
from jaxsloth.convert.peft_adapter import AdapterConfig, read_adapter, stored, write_adapter_files
from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsFile
from jaxsloth.foreign import Count, Schema, read_object, validated
from jaxsloth.models.spec import ModelSpec
from jaxsloth.training.fingerprints import Fingerprints, ForeignCheckpointError

logger = logging.getLogger("jaxsloth.training")

STATE = "state.safetensors"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{1,15})")
_ADVICE = "; restore it, or remove that checkpoint, so that the one before it is taken"


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


class TrainerStateFields(Schema):
    """trainer_state.json of a recipe's run."""

    step: Count
    backend: str
    recipe: dict[str, Any]
    tokens: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    best_step: Count | None = None
    best_loss: float | None = None
    devices: Annotated[int, Field(gt=0)] = 1
    first_tokens: Annotated[int, Field(ge=0)] = 0
    first_seconds: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint read back: the adapter and the optimizer's state as a backend's `load_*` functions take them."""

    state: TrainerState
    adapter: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    folder: Path
    config: AdapterConfig


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
    fingerprints: Fingerprints | None = None,
) -> Path:
    """Writes ``checkpoint-{step}``; a crash at any moment leaves the checkpoints before it as they were.

    on_stage is told where the save stands ("begun", "adapter", "state", "described", "renamed"): tests kill the process there.
    """
    target = output / f"checkpoint-{state.step}"
    with whole_folder(target, overwrite=True) as folder:
        on_stage("begun")
        write_adapter_files(folder, spec, adapter, base_model)
        on_stage("adapter")
        moments = {name: np.asarray(value) for name, value in optimizer.items()}
        save_file(moments, folder / STATE)
        if fingerprints is not None:
            fingerprints.write(folder, {"adapter": stored(adapter), "optimizer": moments})
        on_stage("state")
        (folder / TRAINER_STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        on_stage("described")
    on_stage("renamed")
    return target


def load(folder: Path) -> SavedRun:
    """Reads a checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or not what it should be; or (ForeignCheckpointError) its files are whole
            and contradict each other.
    """
    refuse_links(folder.parent)
    file = folder / TRAINER_STATE
    state = TrainerState(
        **validated(TrainerStateFields, read_object(file, CheckpointError), file, CheckpointError).model_dump()
    )
    config, adapter = read_adapter(folder)
    optimizer = read_optimizer(folder)
    check_saved(folder, state.step, config, adapter, optimizer)
    return SavedRun(state, adapter, optimizer, folder, config)


def read_optimizer(folder: Path) -> dict[str, np.ndarray]:
    """The optimizer's state."""
    file = SafetensorsFile(folder / STATE)
    return {name: np.array(file.read(name)) for name in file.names()}


def check_saved(
    folder: Path,
    step: int,
    config: AdapterConfig,
    adapter: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
) -> None:
    """That the parts of a checkpoint are of one step and of one adapter.

    Raises:
        ForeignCheckpointError: they are not; the message names both sides.
    """
    match = _NAME.fullmatch(folder.name)
    if match is not None and int(match[1]) != step:
        raise ForeignCheckpointError(
            f"{folder / TRAINER_STATE}: the step must be the folder's, {match[1]}, got {step}{_ADVICE}"
        )
    for name, value in adapter.items():
        if not config.rank_pattern and name.endswith(".lora_A.weight") and value.shape[:1] != (config.r,):
            raise ForeignCheckpointError(
                f"{folder}: adapter_config.json says rank {config.r}, and {name} has the shape {value.shape}{_ADVICE}"
            )
    count = optimizer.get("count")
    if count is None or count.shape != () or count.dtype.kind not in "iu":
        raise ForeignCheckpointError(f"{folder / STATE}: count must be an integer, got {_described(count)}{_ADVICE}")
    skips = "loss_scale" in optimizer  # a step whose gradients overflow in float16 is not counted
    if not (0 <= int(count) <= step if skips else int(count) == step):
        raise ForeignCheckpointError(f"{folder / STATE}: Adam's count must be the step, {step}, got {int(count)}{_ADVICE}")
    for name, value in adapter.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            _check_moment(folder, f"{name}.{moment}", optimizer.get(f"{name}.{moment}"), value.shape)


def _check_moment(folder: Path, name: str, moment: np.ndarray | None, shape: tuple[int, ...]) -> None:
    """In float32 it has its parameter's shape; in 8 bits it is codes in blocks."""
    whole = moment is not None and (moment.shape == shape if moment.dtype == np.float32 else moment.size >= math.prod(shape))
    if moment is None or not whole:
        raise ForeignCheckpointError(f"{folder / STATE}: {name} must have the shape {shape}, got {_described(moment)}{_ADVICE}")
    if moment.dtype == np.float32 and not np.isfinite(moment).all():
        raise ForeignCheckpointError(f"{folder / STATE}: {name} must be finite, got NaN or infinite values{_ADVICE}")


def _described(value: np.ndarray | None) -> str:
    return "nothing" if value is None else f"{value.dtype} of the shape {value.shape}"


def check_lora(folder: Path, mine: AdapterConfig, spec: ModelSpec) -> None:
    """That a checkpoint's adapter_config.json describes the adapter that the run trains.

    Raises:
        ForeignCheckpointError: it does not.
    """
    lora = spec.lora
    if lora is None:
        raise ForeignCheckpointError(f"{folder} holds an adapter, and the run trains none")
    for name, before, now in (
        ("r", mine.r, lora.r),
        ("lora_alpha", mine.alpha, lora.alpha),
        ("use_rslora", mine.rslora, lora.rslora),
        ("bias", mine.bias, lora.bias),
        ("rank_pattern", dict(mine.rank_pattern or {}), {}),  # a run has one rank and one alpha
        ("alpha_pattern", dict(mine.alpha_pattern or {}), {}),
    ):
        if before != now:
            raise ForeignCheckpointError(
                f"{folder / 'adapter_config.json'}: {name} must be what the run trains with, {now}, got {before}{_ADVICE}"
            )


def refuse_links(output: Path) -> None:
    """That nothing but folders stands in the place of checkpoints.

    Raises:
        ForeignCheckpointError: a link or a file does.
    """
    for entry in output.iterdir() if output.is_dir() else ():
        if _NAME.fullmatch(entry.name) and (entry.is_symlink() or not entry.is_dir()):
            kind = "a link" if entry.is_symlink() else "a file"
            raise ForeignCheckpointError(f"{entry} must be a checkpoint's folder, and is {kind}; move it away")


def steps_saved(output: Path) -> list[int]:
    """The steps of all checkpoint folders, ascending; links and files are none."""
    if not output.is_dir():
        return []
    entries = [entry for entry in output.iterdir() if entry.is_dir() and not entry.is_symlink()]
    return sorted(int(match[1]) for entry in entries if (match := _NAME.fullmatch(entry.name)))


def latest(output: Path) -> SavedRun | None:
    """The newest checkpoint that is whole; a broken one is passed over with a warning. None where there is none at all.

    Raises:
        CheckpointError: there are some, and none is whole: going on would be beginning again, over them.
        ForeignCheckpointError: a whole one's files contradict each other, or a link or file stands in a checkpoint's place.
    """
    refuse_links(output)
    found = steps_saved(output)
    last = ""
    for step in reversed(found):
        try:
            return load(output / f"checkpoint-{step}")
        except ForeignCheckpointError:
            raise
        except CheckpointError as error:
            last = str(error)
            logger.warning("checkpoint-%d can't be read and is passed over: %s", step, error)
    if found:
        raise CheckpointError(f"{output} holds no checkpoint that can be read, so nothing can go on: {last}")
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
