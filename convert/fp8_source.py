"""Checkpoints whose weights are scaled float8 (e4m3), dequantized as they are read: transformers' FineGrainedFP8, with a scale
a block in ``weight_scale_inv``, and compressed-tensors' float-quantized, with a scale a matrix, a row or a block in
``weight_scale``. A weight is its codes times their scale, whichever of the two names it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsSource

FP8 = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")  # after a weight's own name
# Scales of activations, which are computed unquantized here.
_ACTIVATIONS = (".input_scale", ".activation_scale")


class Fp8Source:
    """A folder of scaled float8 weights, float32 when read; the rest as it is."""

    def __init__(self, folder: Path, block: tuple[int, int] | None) -> None:
        self._files, self._block = SafetensorsSource(folder), block
        present = set(self._files.names())
        self._scales: dict[str, str] = {}
        for name in self._files.names():
            if self._files.stored_as(name) != FP8:
                continue
            scale = next((f"{name}{ending}" for ending in _SCALES if f"{name}{ending}" in present), None)
            if scale is None:
                raise CheckpointError(
                    f"{self._files.file_of(name)}: {name} is float8, and neither {name}_scale_inv nor {name}_scale is there"
                )
            self._scales[name] = scale
            self._shape_of_block(name)
        parts = set(self._scales.values())
        self._names = tuple(name for name in self._files.names() if name not in parts and not name.endswith(_ACTIVATIONS))

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def read(self, name: str) -> np.ndarray:
        value = self._files.read(name)
        if name not in self._scales:
            return value
        scale = np.asarray(self._files.read(self._scales[name]), np.float32)
        if not np.isfinite(scale).all():
            where = f"{self.file_of(name)}: {self._scales[name]}"
            raise CheckpointError(f"{where} must hold finite values; the checkpoint is damaged")
        return dequantized_blocks(value, scale, self._shape_of_block(name))

    def file_of(self, name: str) -> Path:
        return self._files.file_of(name)

    def stored_as(self, name: str) -> str:
        return "FP8" if name in self._scales else self._files.stored_as(name)

    def _shape_of_block(self, name: str) -> tuple[int, int]:
        """Rows and columns that a scale of this weight stands for."""
        shape, scale = self._files.shape(name), self._files.shape(self._scales[name])
        if len(shape) != 2 or self._files.stored_as(self._scales[name]) not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{self.file_of(name)}: {name} must be a matrix, with scales in F32, BF16 or F16, got {shape} and "
                f"{self._files.stored_as(self._scales[name])}"
            )
        rows, columns = shape
        count = int(np.prod(scale))
        if count == 1:
            return rows, columns
        if self._block is not None and scale == (-(-rows // self._block[0]), -(-columns // self._block[1])):
            return self._block
        if self._block is None and scale in ((rows,), (rows, 1)):
            return 1, columns
        wanted = f"blocks of {self._block[0]} × {self._block[1]}" if self._block is not None else "a matrix or a row"
        raise CheckpointError(
            f"{self.file_of(name)}: {self._scales[name]} must hold a scale for {wanted} of {name} {shape}, got {scale}"
        )


def dequantized_blocks(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32 ``[out, in]``: each block of the codes times its scale; blocks at the edges may be smaller."""
    grid = scale.reshape(-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1]))
    spread = np.repeat(grid, block[1], axis=1)[:, : codes.shape[1]]
    value = codes.astype(np.float32)
    for row in range(len(grid)):  # the scales are never spread out whole
        value[row * block[0] : (row + 1) * block[0]] *= spread[row]
    return value


def fp8_block(quantization: Mapping[str, Any], file: Path) -> tuple[bool, tuple[int, int] | None]:
    """(whether a quantization_config is one of scaled float8, the blocks that have a scale each; None: matrices or rows).

    Raises:
        CheckpointError: it is float8 of a kind that is not known.
    """
    method = quantization.get("quant_method")
    if method == "fp8":
        return True, _pair(quantization.get("weight_block_size"), f"{file}: weight_block_size")
    if method != "compressed-tensors":
        return False, None
    if quantization.get("format") != "float-quantized":
        return False, None
    groups = quantization.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    blocks = {str(weight.get("block_structure")): weight.get("block_structure") for weight in weights}
    if not weights or len(blocks) > 1:
        raise CheckpointError(f"{file}: config_groups must describe weights of one block_structure, got {list(blocks)}")
    return True, _pair(next(iter(blocks.values())), f"{file}: block_structure")


def _pair(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise CheckpointError(f"{where} must be two positive integers, got {value!r}")
