"""Models in orbax folders, in any of `jax_layouts`' trees: found, told apart, and read under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsloth.backend import DtypeName
from jaxsloth.convert.fitting import Clamped, check_cast
from jaxsloth.convert.jax_layouts import FOLDERS, Layout, Leaf, Part, leaves
from jaxsloth.convert.orbax_tree import METADATA, Lazy, StoredTree, write_tree
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import ModelSpec

_DTYPES: dict[DtypeName, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_SHOWN = 20
_SMALL = 1 << 30


def write_model(
    folder: Path,
    spec: ModelSpec,
    layout: Layout,
    dtype: DtypeName,
    read: Callable[[str], np.ndarray],
    on_written: Callable[[str], None],
    file_bytes: int,
    clamped: Clamped | None = None,
) -> None:
    """Writes a model's tree into `folder`/`FOLDERS[layout]`. What memory must hold: the largest leaf and its largest tensor.

    Args:
        read: a tensor by its Hugging Face name; values that dtype can't hold are refused, or counted in `clamped`.
        on_written: is told the names as their tensors are taken.
    """

    def lazy(leaf: Leaf) -> Lazy:
        kind = np.dtype(_DTYPES[leaf.dtype])

        def form() -> np.ndarray:
            whole = None
            for part in leaf.parts:
                value = part.change.into(check_cast(part.name, read(part.name), kind, clamped))
                on_written(part.name)
                if part.index == ():
                    return value
                whole = np.empty(leaf.shape, kind) if whole is None else whole
                whole[part.index] = value
            assert whole is not None
            return whole

        return Lazy(leaf.path, leaf.shape, kind, form)

    write_tree(folder / FOLDERS[layout], [lazy(leaf) for leaf in leaves(spec, layout, dtype)], file_bytes)


def find_tree(folder: Path) -> Path | None:
    """Where a folder has its orbax tree: itself, one of the folders that conversions write, or the last step's items."""
    steps = sorted((int(entry.name), entry) for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir())
    inside = [folder / name for name in ("", *FOLDERS.values(), "default", "model_params")]
    for _, step in reversed(steps):
        inside += [step / name for name in ("items", "model_params", "default", "params", "state", "")]
    return next((place for place in inside if (place / METADATA).is_file()), None)


class OrbaxSource:
    """A model's tree as a TensorSource, under Hugging Face names, those of one array behind each other. Of arrays that hold
    several tensors (MaxText's, of all layers) the largest stays in memory when it was read, or all where they are small.

    Raises:
        CheckpointError: the tree is in no known layout, or is not that of the model that config.json describes.
    """

    def __init__(self, tree: Path, config: Mapping[str, Any], where: Path) -> None:
        self._tree, self._file = StoredTree(tree), tree / METADATA
        self.layout, root = _told_apart(self._tree, self._file)
        stored = {_plain(path): path for path in self._tree.paths if path[: len(root)] == root}
        spec = spec_from_config(config, where)
        self._parts: dict[str, tuple[tuple[str, ...], Part]] = {}
        several: list[int] = []  # bytes
        for leaf in leaves(spec, self.layout, "float32"):
            path = stored.pop(_plain((*root, *leaf.path[len(_root(self.layout)) :])), None)
            if path is None:
                continue  # what is missing is named when the checkpoint is checked
            if self._tree.shape(path) != leaf.shape:
                raise CheckpointError(
                    f"{self._file}: {'.'.join(path)} must have the shape {leaf.shape} by {where}, got {self._tree.shape(path)}"
                )
            self._parts.update({part.name: (path, part) for part in leaf.parts})
            if len(leaf.parts) > 1:
                several.append(leaf.values * self._tree.dtype(path).itemsize)
        if several:
            self._tree.keep(max(*several, min(sum(several), _SMALL)))
        if stored:
            names = [".".join(path) for path in stored.values()]
            raise CheckpointError(
                f"{self._file}: the model that {where} describes has no place for {len(names)} of the tree's arrays: "
                f"{', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}; mend config.json"
            )

    def names(self) -> Sequence[str]:
        return tuple(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        path, part = self._parts[name]
        shape = self._tree.shape(path)
        inside = tuple(size for size, at in zip(shape, _padded(part.index, shape), strict=True) if not isinstance(at, int))
        return part.change.back(np.broadcast_to(np.int8(0), inside)).shape

    def read(self, name: str) -> np.ndarray:
        path, part = self._parts[name]
        return part.change.back(self._tree.read(path, part.index))

    def stored_as(self, name: str) -> str:
        dtype = self._tree.dtype(self._parts[name][0])
        return _STORED.get(dtype.name, dtype.name)

    def file_of(self, name: str) -> Path:
        return self._file


def _padded(index: tuple[int | slice, ...], shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    return (*index, *(slice(None) for _ in shape[len(index) :]))


def _root(layout: Layout) -> tuple[str, ...]:
    return ("params", "params") if layout == "maxtext" else ()


def _plain(path: tuple[str, ...]) -> tuple[str, ...]:
    """Without the `value` that an nnx.State's leaves end in."""
    return path[:-1] if path[-1] == "value" else path


def _told_apart(tree: StoredTree, file: Path) -> tuple[Layout, tuple[str, ...]]:
    """(the layout, the path to the tree's root: MaxText's parameters stand in a training state, or alone)."""
    firsts = {path[0] for path in tree.paths}
    for depth in range(3):
        root = ("params",) * depth
        if any(path[: depth + 1] == (*root, "token_embedder") for path in tree.paths):
            return "maxtext", root
    if "embedder" in firsts:
        return "tunix", ()
    if firsts <= {"model", "lm_head"}:
        return "orbax", ()
    raise CheckpointError(
        f"{file}: the tree must be flax.nnx' with Hugging Face's modules (model, lm_head), MaxText's (token_embedder, decoder) "
        f"or Tunix's (embedder, layers), got {', '.join(sorted(firsts)[:_SHOWN])}"
    )
