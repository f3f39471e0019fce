"""Writing safetensors folders tensor by tensor, so that the largest tensor, not a shard, is what memory must hold."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxsloth.convert.safetensors_source import INDEX, SINGLE

SHARD_BYTES = 4 << 30
_ALIGNED = 8
_METADATA = {"format": "pt"}
_DTYPES: dict[Any, str] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
}


class SafetensorsWriter:
    """A folder's shards: ``model.safetensors``, or numbered ones with their index. A context manager.

    A header stands before the tensors and is known only behind them: space for it is left, and filled up with blanks, as the
    format allows. names: of the tensors that will come, for that space; parts: how many each is written as, at most.

    Example::

        with SafetensorsWriter(folder, names=tensor_shapes(spec)) as writer:
            writer.add("model.norm.weight", array)
    """

    def __init__(self, folder: Path, names: Collection[str], shard_bytes: int = SHARD_BYTES, parts: int = 1) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        # An entry is a name, of a part perhaps with an ending, and a dtype, a shape and offsets.
        entries = sum(parts * (len(name) + (100 if parts == 1 else 140)) for name in names)
        self._space = -(-(256 + entries) // _ALIGNED) * _ALIGNED
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._end = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._close_shard()
            self._name_files()
        elif self._file is not None:
            self._file.close()

    def add(self, *tensors: tuple[str, np.ndarray]) -> None:
        """Writes tensors that belong together into one shard: the present one, unless it would pass its size."""
        size = sum(array.nbytes for _, array in tensors)
        if self._file is not None and self._end + size > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            path = self._folder / f"shard-{len(self._shards)}.safetensors"
            self._file, self._header, self._end = path.open("wb"), {}, 0
            self._shards.append((path, []))
            self._file.seek(8 + self._space)
        for name, array in tensors:
            if name in self._header or any(name in names for _, names in self._shards):
                raise ValueError(f"the tensor {name} would be written twice")
            shape = list(array.shape)  # ascontiguousarray makes a scalar a vector
            array = np.ascontiguousarray(array)
            self._file.write(array.reshape(-1).view(np.uint8).data)
            end = self._end + array.nbytes
            self._header[name] = {
                "dtype": _DTYPES[array.dtype],
                "shape": shape,
                "data_offsets": [self._end, end],
            }
            self._end = end
            self._shards[-1][1].append(name)
        self.total_bytes += size

    def _close_shard(self) -> None:
        if self._file is None:
            return
        text = json.dumps({"__metadata__": _METADATA} | self._header, separators=(",", ":")).encode()
        if len(text) > self._space:
            raise RuntimeError(f"a header of {len(text)} bytes does not fit the {self._space} that were left for it")
        self._file.seek(0)
        self._file.write(self._space.to_bytes(8, "little") + text.ljust(self._space))
        self._file.close()
        self._file = None

    def _name_files(self) -> None:
        """Hugging Face's file names, which hold the number of shards, known only at the end; and the index."""
        if len(self._shards) == 1:
            self._shards[0][0].rename(self._folder / SINGLE)
            return
        where: dict[str, str] = {}
        for number, (file, names) in enumerate(self._shards, start=1):
            final = self._folder / f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            file.rename(final)
            where.update(dict.fromkeys(names, final.name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
