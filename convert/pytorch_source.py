"""Legacy checkpoints: ``pytorch_model.bin``, one file or many, which are pickles.

torch reads them with ``weights_only=True``, which builds tensors and plain containers and runs nothing else, over a memory
map, so that reading a tensor touches its own bytes only.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import Schema, checked, read_object, validated

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_STORED = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".bin") and Path(name).name == name and "\0" not in name


class _Index(Schema):
    """pytorch_model.bin.index.json: which file of the folder holds a tensor."""

    weight_map: dict[str, Annotated[str, checked("the name of a .bin file in the index' own folder", _is_inside)]]


def holds_pickles(folder: Path) -> bool:
    """Whether a folder's weights are in this format."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


class PytorchSource:
    """A folder of .bin files as a TensorSource.

    Raises:
        CheckpointError: torch is not installed, a file is missing or damaged, or it asks for more than tensors.
    """

    def __init__(self, folder: Path) -> None:
        if find_spec("torch") is None:
            raise CheckpointError(f"{folder} holds pickles ({SINGLE}), which torch reads; run: pip install 'jaxsloth[torch]'")
        self._tensors: dict[str, Any] = {}
        self._where: dict[str, Path] = {}
        for file in _files(folder):
            for name, tensor in _loaded(file).items():
                self._tensors[name], self._where[name] = tensor, file

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> np.ndarray:
        """The tensor over the mapped file, bfloat16 as ml_dtypes.bfloat16."""
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def file_of(self, name: str) -> Path:
        return self._where[name]

    def stored_as(self, name: str) -> str:
        kind = str(self._tensors[name].dtype).removeprefix("torch.")
        return _STORED.get(kind, kind)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE]
    names = sorted(set(validated(_Index, read_object(index, CheckpointError), index, CheckpointError).weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{index} must name files that are there; missing: {', '.join(missing) or 'all'}")
    return [folder / name for name in names]


def _loaded(file: Path) -> dict[str, Any]:
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} is refused: it is a pickle that asks for more than tensors, which could run any code, or is damaged; "
            f"nothing of it was run. Take the safetensors of the model, or have its maker save tensors alone ({reason[:300]})"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{file} is not a whole file of torch.save's zip format (truncated, corrupt, or older than torch 1.6): "
            f"{reason[:300]}"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise CheckpointError(f"{file} must hold tensors by name, got {type(found).__name__} with other things in it")
    return found
