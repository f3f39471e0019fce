"""Hugging Face safetensors checkpoints, one file or many, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxsloth.foreign import ForeignError, Schema, checked, decoded, parse_json, read_object, validated

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "I8": np.int8,
    "BOOL": np.bool_,
}
_HEADER_LENGTH_BYTES = 8


class CheckpointError(ForeignError):
    """A checkpoint that can't be read: the message names the file, and the tensor where it is one."""


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\0" not in name


Shard = Annotated[str, checked("the name of a .safetensors file in the index' own folder", _is_inside)]


class Index(Schema):
    """model.safetensors.index.json: which file of the folder holds a tensor."""

    weight_map: dict[str, Shard]


class SafetensorsFile:
    """The tensors of one file, memory-mapped: reading one touches its own bytes only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} must be a safetensors file, and is {'a folder' if path.is_dir() else 'not there'}")
        try:
            with safe_open(path, framework="np") as file:  # checks the header against the file's size
                self.metadata: dict[str, str] = file.metadata() or {}
            with path.open("rb") as raw:
                size = int.from_bytes(raw.read(_HEADER_LENGTH_BYTES), "little")
                text = raw.read(size)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file (truncated or corrupt): {error}") from error
        header = parse_json(decoded(text, path, CheckpointError), f"{path} (its header)", CheckpointError)
        header.pop("__metadata__", None)
        self._entries: dict[str, Any] = header
        self._data_start = _HEADER_LENGTH_BYTES + size

    def names(self) -> Sequence[str]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def layout(self) -> list[tuple[tuple[str, str, tuple[int, ...]], int, int]]:
        """((name, dtype, shape), its first byte in the file, bytes) of every tensor."""
        return [
            ((name, entry["dtype"], tuple(entry["shape"])), self._data_start + entry["data_offsets"][0], end - begin)
            for name, entry in self._entries.items()
            for begin, end in [entry["data_offsets"]]
        ]

    def stored_as(self, name: str) -> str:
        """The dtype in safetensors' words."""
        return str(self._entries[name]["dtype"])

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the mapped file (bfloat16 as ml_dtypes.bfloat16)."""
        entry = self._entries[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name} has dtype {entry['dtype']}; known: {sorted(_DTYPES)}")
        shape, begin = tuple(entry["shape"]), entry["data_offsets"][0]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype=dtype, mode="r", offset=self._data_start + begin, shape=shape or (1,)).reshape(shape)


class SafetensorsSource:
    """A checkpoint folder as a TensorSource, under the names that its files use."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, SafetensorsFile] = {}
        for file in _shards(folder):
            opened = SafetensorsFile(file)
            self._files.update(dict.fromkeys(opened.names(), opened))

    def names(self) -> Sequence[str]:
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def stored_as(self, name: str) -> str:
        return self._files[name].stored_as(name)

    def file_of(self, name: str) -> Path:
        return self._files[name].path


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        names = sorted(set(validated(Index, read_object(index, CheckpointError), index, CheckpointError).weight_map.values()))
        if not names:
            raise CheckpointError(f"{index}: weight_map must name at least one tensor's file, and is empty")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{index} names files that are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    single = folder / SINGLE
    if not single.is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    return [single]
