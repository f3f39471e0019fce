"""Checkpoints in bitsandbytes' 8 bits (LLM.int8): int8 codes with one maximum a row, read, written, and as numbers.

A row stands for ``codes · SCB / 127``, SCB being its largest magnitude in float16, in which bitsandbytes quantizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.fitting import Clamped, check_cast, not_numbers
from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsSource

_SCALE, _FORMAT = "SCB", "weight_format"
_PER_STEP = np.float32(7.874015718698502e-3)  # 1 / 127, as bitsandbytes writes it
_ROW_MAJOR = 0


class Bnb8BitSource:
    """A folder with ``quantization_config.load_in_8bit``: quantized weights are returned dequantized, float32."""

    def __init__(self, folder: Path) -> None:
        self._files = SafetensorsSource(folder)
        present = self._files.names()
        modules = [name.removesuffix(f".{_SCALE}") for name in present if name.endswith(f".{_SCALE}")]
        self._scales = {f"{module}.weight": f"{module}.{_SCALE}" for module in modules}
        for weight in self._scales:
            self._check(weight)
        parts = {f"{module}.{part}" for module in modules for part in (_SCALE, _FORMAT)}
        self._names = tuple(name for name in present if name not in parts)

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(name)

    def read(self, name: str) -> np.ndarray:
        if name not in self._scales:
            return self._files.read(name)
        scale = np.asarray(self._files.read(self._scales[name]), np.float32).reshape(-1)
        if not np.isfinite(scale).all():
            raise CheckpointError(
                f"{self.file_of(name)}: {self._scales[name]} must hold finite values; the checkpoint is damaged"
            )
        return dequantized_rows(self._files.read(name), scale)

    def file_of(self, name: str) -> Path:
        return self._files.file_of(name)

    def stored_as(self, name: str) -> str:
        return "INT8" if name in self._scales else self._files.stored_as(name)

    def _check(self, weight: str) -> None:
        """That codes and maxima fit each other, and lie row by row."""
        scale = self._scales[weight]
        file = self._files.file_of(scale)
        if weight not in self._files.names():
            raise CheckpointError(f"{file}: tensor {weight} is missing beside {scale}")
        if self._files.stored_as(weight) != "I8" or len(self._files.shape(weight)) != 2:
            raise CheckpointError(
                f"{file}: {weight} must be a matrix of int8, got {self._files.stored_as(weight)} {self._files.shape(weight)}"
            )
        rows = self._files.shape(weight)[0]
        if int(np.prod(self._files.shape(scale))) != rows or self._files.stored_as(scale) not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{file}: {scale} must hold {rows} floating-point numbers, one a row of {weight}, got "
                f"{self._files.stored_as(scale)} {self._files.shape(scale)}"
            )
        layout = f"{weight.removesuffix('.weight')}.{_FORMAT}"
        if layout in self._files.names():
            found = np.asarray(self._files.read(layout)).reshape(-1)
            if found.tolist() != [_ROW_MAJOR]:
                raise CheckpointError(
                    f"{file}: {layout} must be 0 (row by row), got {found.tolist()[:4]}: a layout of some GPUs, which "
                    "bitsandbytes reads no more either; save the model again with an older bitsandbytes, dequantized"
                )


def is_bnb8bit(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes quantized the checkpoint to 8 bits."""
    quantization = config.get("quantization_config") or {}
    return quantization.get("quant_method") == "bitsandbytes" and bool(quantization.get("load_in_8bit"))


def bnb8bit_config(dtype: str) -> dict[str, Any]:
    """config.json's quantization_config of such a checkpoint."""
    del dtype  # the rest's, which config.json says by itself
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
    }


def bnb8bit_parts(name: str, weight: np.ndarray, clamped: Clamped | None = None) -> dict[str, np.ndarray]:
    """bitsandbytes' tensors of one weight ``[out, in]``: int8 codes, float32 SCB ``[out]``, and the layout's number.

    Raises:
        CheckpointError: a value is too large for float16 (and `clamped` is none, in which they are counted), or no number.
    """
    codes, scale = quantized_rows(check_cast(name, weight, np.float16, clamped))
    if not np.isfinite(scale).all():
        raise not_numbers(name, "int8")
    module = name.removesuffix(".weight")
    return {name: codes, f"{module}.{_SCALE}": scale, f"{module}.{_FORMAT}": np.array(_ROW_MAJOR, np.uint8)}


def quantized_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 codes, float32 maxima) of a float16 matrix, as bitsandbytes' int8_vectorwise_quant forms them on a CPU."""
    values = weight.astype(np.float32)
    scale = np.abs(values).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = values * (np.float32(1) / scale * np.float32(127))[:, None]  # torch divides a number by a tensor so
    return np.rint(np.where(scale[:, None] > 0, steps, 0)).astype(np.int8), scale


def dequantized_rows(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 ``[out, in]``, as bitsandbytes' int8_vectorwise_dequant forms it."""
    return codes.astype(np.float32) * scale[:, None] * _PER_STEP


def bnb8bit_bytes(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] + 4 * shape[0] + 1
