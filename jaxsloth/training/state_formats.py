"""A run's checkpoint as an orbax tree and back; a PEFT adapter likewise, as a tree that holds no optimizer.

A checkpoint is the same whichever backend wrote it, and either resumes it: nothing converts between the backends.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from safetensors.numpy import save_file

from jaxsloth.convert.files import check_replaced, check_target, whole_folder
from jaxsloth.convert.orbax_tree import METADATA, Lazy, StoredTree, write_tree
from jaxsloth.convert.peft_adapter import CONFIG, WEIGHTS, read_config
from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsFile
from jaxsloth.convert.safetensors_writer import SHARD_BYTES
from jaxsloth.foreign import read_object, validated
from jaxsloth.training.checkpoint import STATE, TRAINER_STATE, TrainerStateFields, check_saved, load
from jaxsloth.training.fingerprints import FILE as FINGERPRINTS
from jaxsloth.training.fingerprints import foreign_files, read_fingerprints

StateFormat = Literal["orbax", "run-state", "peft"]
TREE = "params"
_ROOTS = {"adapter": WEIGHTS, "optimizer": STATE}
_KEPT = (CONFIG, TRAINER_STATE, FINGERPRINTS)


def is_state(source: str, to: str) -> bool:
    """Whether `source` is a run's checkpoint, a PEFT adapter or a tree of one, and `to` is made of it here."""
    folder = Path(source)
    if not (folder / CONFIG).is_file():
        return False
    return to in ("orbax", "run-state") or (to == "peft" and (folder / TREE / METADATA).is_file())


def convert_state(source: Path, destination: Path, to: StateFormat, *, overwrite: bool = False) -> Path:
    """Writes a run's state in another format, every array with its bits; the destination appears whole or not at all.

    Args:
        source: a run's ``checkpoint-{step}``, a PEFT adapter's folder, or what this wrote as "orbax" of either.
        to: "orbax": a tree ``adapter/…`` (and ``optimizer/…`` of a run) under PEFT's names cut at their dots, in `params`, with
            adapter_config.json and trainer_state.json beside it. "run-state": a checkpoint's folder. "peft": the adapter alone.

    Raises:
        ValueError: the format is unknown, or orbax is not installed.
        ExistsError: the destination is there and overwrite is False.
        CheckpointError: the source can't be read, or holds no run's position and optimizer where a run's state is asked for.
    """
    if to not in get_args(StateFormat):
        raise ValueError(f"the format of a run's state must be one of {', '.join(get_args(StateFormat))}; got {to!r}")
    check_target(destination, folder=True, overwrite=overwrite)
    check_replaced(destination, [source / CONFIG])
    config = read_config(source)
    values = _read(source)
    noted = read_fingerprints(source) if to != "peft" else None
    changed = foreign_files(noted, values) if noted is not None else ""
    if changed:
        raise CheckpointError(f"{source}: {changed}; restore them, or remove {FINGERPRINTS} to take them as they are")
    whole = "optimizer" in values and (source / TRAINER_STATE).is_file()
    if to == "run-state" and not whole:
        raise CheckpointError(
            f"{source} must hold an optimizer's state and {TRAINER_STATE} to become a run's state, and is an adapter alone; "
            f"begin a run from it instead: jaxsloth train RECIPE lora.adapter={_as_peft(source)}"
        )
    if to == "run-state":
        file = source / TRAINER_STATE
        step = validated(TrainerStateFields, read_object(file, CheckpointError), file, CheckpointError).step
        check_saved(source, step, config, values["adapter"], values["optimizer"])
        if destination.name != f"checkpoint-{step}":
            raise CheckpointError(f"the folder of a run's state must be called checkpoint-{step}, got {destination.name}")
    with whole_folder(destination, overwrite=overwrite) as temporary:
        for name in _KEPT if to != "peft" else (CONFIG,):
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        if to == "orbax":
            _write_tree(temporary / TREE, values)
            return destination
        for root in ("adapter",) if to == "peft" else ("adapter", "optimizer"):
            metadata = {"format": "pt"} if root == "adapter" else None
            save_file(values[root], temporary / _ROOTS[root], metadata=metadata)
        if to == "run-state" and noted is not None:  # of an older version, it knows nothing of its files
            noted.write(temporary, values)
    return destination


def _as_peft(source: Path) -> str:
    tree = (source / TREE / METADATA).is_file()
    return f"FOLDER, where FOLDER is what jaxsloth convert {source} FOLDER --to peft writes" if tree else str(source)


def _read(source: Path) -> dict[str, dict[str, np.ndarray]]:
    """{"adapter": arrays by PEFT's names, "optimizer": likewise, where there is one}."""
    if (source / TREE / METADATA).is_file():
        tree, found = StoredTree(source / TREE), {}
        for root, *path in tree.paths:
            if root not in _ROOTS or not path:
                raise CheckpointError(f"{source / TREE}: a run's tree must hold adapter and optimizer, got {root}")
            found.setdefault(root, {})[".".join(path)] = np.array(tree.read((root, *path)), order="C")
        if "adapter" not in found:
            raise CheckpointError(f"{source / TREE}: a run's tree must hold an adapter, and has none")
        return found
    if (source / TRAINER_STATE).is_file():
        load(source)  # says what is damaged before anything is written
    files = {root: source / name for root, name in _ROOTS.items() if root == "adapter" or (source / name).is_file()}
    opened = {root: SafetensorsFile(file) for root, file in files.items()}
    return {root: {name: np.array(file.read(name)) for name in file.names()} for root, file in opened.items()}


def _write_tree(folder: Path, values: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    arrays = [
        Lazy((root, *name.split(".")), value.shape, value.dtype, lambda value=value: value)
        for root, named in values.items()
        for name, value in named.items()
    ]
    write_tree(folder, arrays, SHARD_BYTES)
