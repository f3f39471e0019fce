"""Orbax checkpoints as trees of arrays: written one array at a time by orbax, read slice by slice by its store, tensorstore."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.extras import require
from jaxsloth.foreign import Schema, checked, read_object, validated

METADATA = "_METADATA"
CHUNK_BYTES = 64 << 20  # what a process of many devices reads at least, where it reads a part of an array


@dataclass(frozen=True)
class Lazy:
    """An array of the tree that is formed when it is its turn to be written."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    form: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def write_tree(folder: Path, arrays: Iterable[Lazy], file_bytes: int) -> None:
    """Writes a folder that plain orbax reads: nested dicts of numpy arrays.

    One array is in memory at a time, and its compressed bytes. file_bytes: about what one file holds.

    Raises:
        MissingExtraError: orbax is not installed. OSError: the disk is full.
    """
    require("orbax", "an orbax checkpoint")
    import jax
    import orbax.checkpoint as ocp

    class OneAtATime(ocp.type_handlers.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            for value, info, settings in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                for written in await super().serialize([value.form()], [info], [settings]):
                    await asyncio.to_thread(written.result)
            return []

    tree: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for array in arrays:
        _put(tree, array.path, array)
        _put(settings, array.path, ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES))
    registry = ocp.type_handlers.create_type_handler_registry(
        (Lazy, OneAtATime(deepcopy_host_arrays=False)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = ocp.args.PyTreeSave(tree, save_args=settings, ocdbt_target_data_file_size=file_bytes)
    try:
        with _without_progress(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
            writer.save(folder.absolute(), args=wanted)
    except ValueError as error:  # what tensorstore makes of the system's errors
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


class _without_progress:
    """absl's and orbax's accounts of every save, which go to stderr, are left out; so are those of errors, which are raised."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("absl")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


class _Key(Schema):
    key: str


class _Entry(Schema):
    key_metadata: list[_Key]
    value_metadata: dict[str, Any]


def _are_entries(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


class TreeDocument(Schema):
    """orbax's _METADATA: the paths of a tree, and how its arrays are stored."""

    tree_metadata: Annotated[dict[str, _Entry], checked("an object of at least one array", _are_entries)]
    use_zarr3: bool = False


class StoredTree:
    """The arrays of an orbax folder. Headers are read; values are, when they are asked for."""

    def __init__(self, folder: Path) -> None:
        require("orbax", f"{folder}, an orbax checkpoint,", CheckpointError)
        file = folder / METADATA
        document = validated(TreeDocument, read_object(file, CheckpointError), file, CheckpointError)
        self.folder, self._driver = folder, "zarr3" if document.use_zarr3 else "zarr"
        self.paths = [tuple(key.key for key in entry.key_metadata) for entry in document.tree_metadata.values()]
        self._stores: dict[tuple[str, ...], Any] = {}
        self._kept: Any = None

    def keep(self, nbytes: int) -> None:
        """Keeps so much of what was read in memory: a chunk that slices are read from is decompressed once, not for each."""
        import tensorstore

        self._kept = tensorstore.Context({"cache_pool": {"total_bytes_limit": nbytes}})
        self._stores.clear()

    def shape(self, path: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(int(size) for size in self._store(path).shape)

    def dtype(self, path: tuple[str, ...]) -> np.dtype:
        return np.dtype(self._store(path).dtype.numpy_dtype)

    def read(self, path: tuple[str, ...], index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """An array, or the part of it at index.

        Raises:
            CheckpointError: its files are damaged or missing.
        """
        store = self._store(path)
        try:
            value = np.asarray((store[index] if index else store).read().result())
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {'.'.join(path)} can't be read: {error}") from error
        return value

    def _store(self, path: tuple[str, ...]) -> Any:
        if path not in self._stores:
            import tensorstore

            name, place = ".".join(path), f"file://{self.folder.absolute()}/"
            packed = (self.folder / "manifest.ocdbt").is_file()
            kvstore = {"driver": "ocdbt", "base": place, "path": f"{name}/"} if packed else f"{place}{name}/"
            try:
                opened = tensorstore.open(
                    {"driver": self._driver, "kvstore": kvstore, "recheck_cached_data": "open"},
                    read=True,
                    open=True,
                    assume_metadata=False,
                    context=self._kept,
                ).result()
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{self.folder}: {name} is named in {METADATA} and can't be opened: {error}") from error
            self._stores[path] = opened
        return self._stores[path]
