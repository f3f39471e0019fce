"""Checkpoints that bitsandbytes has quantized to NF4, read as they are: no weight is quantized again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsSource
from jaxsloth.foreign import Schema, checked, decoded, parse_json, shown, validated
from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4, Nested

_STATE = "quant_state.bitsandbytes__nf4"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE)


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


class QuantState(Schema):
    """The scalars of a quantized weight, which bitsandbytes stores as JSON in a uint8 tensor."""

    quant_type: str = "nf4"
    blocksize: int = BLOCK
    nested_blocksize: int = NESTED_BLOCK
    shape: Annotated[list[int], checked("a list of two positive integers", _is_matrix)]
    nested_offset: float | None = None


class Bnb4BitSource:
    """A folder with ``quantization_config.load_in_4bit``: quantized weights are returned as NF4 of numpy arrays."""

    def __init__(self, folder: Path) -> None:
        self._files = SafetensorsSource(folder)
        present = set(self._files.names())
        self._states: dict[str, QuantState] = {}
        for name in present:
            if name.endswith(f".{_STATE}"):
                weight = name.removesuffix(f".{_STATE}")
                self._states[weight] = self._read_state(weight)
        parts = {f"{weight}.{part}" for weight in self._states for part in _PARTS}
        self._names = tuple(name for name in self._files.names() if name not in parts)
        other = [name for name in self._names if ".quant_state.bitsandbytes__" in name]
        if other:
            raise CheckpointError(f"{folder}: {other[0]} is not NF4; only bitsandbytes' nf4 type can be loaded")

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._states[name].shape) if name in self._states else self._files.shape(name)

    def read(self, name: str) -> np.ndarray | NF4:
        if name not in self._states:
            return self._files.read(name)
        state, codes = self._states[name], np.asarray(self._files.read(name)).reshape(-1).view(np.uint8)
        out, in_ = state.shape
        nested, absmax = None, np.asarray(self._part(name, "absmax"))
        if state.nested_offset is not None:
            nested = Nested(
                absmax=np.asarray(self._part(name, "nested_absmax"), np.float32),
                offset=np.asarray(state.nested_offset, np.float32),
                code=np.asarray(self._part(name, "nested_quant_map"), np.float32),
            )
        scales = (absmax,) if nested is None else (nested.absmax, nested.offset)
        if not all(np.isfinite(part).all() for part in scales):
            raise CheckpointError(f"{self.file_of(name)}: {name} has NaN or infinite block maxima; the checkpoint is damaged")
        return NF4(codes=codes, absmax=absmax, nested=nested, shape=(out, in_))

    def file_of(self, name: str) -> Path:
        return self._files.file_of(name)

    def stored_as(self, name: str) -> str:
        return "NF4" if name in self._states else self._files.stored_as(name)

    def _part(self, weight: str, part: str) -> np.ndarray:
        name = f"{weight}.{part}"
        if name not in self._files.names():
            raise CheckpointError(f"{self._files.file_of(weight)}: tensor {name} is missing beside {weight}")
        return self._files.read(name)

    def _read_state(self, weight: str) -> QuantState:
        if weight not in self._files.names():
            raise CheckpointError(f"{self._files.file_of(f'{weight}.{_STATE}')}: tensor {weight} is missing beside its state")
        file = self._files.file_of(weight)
        where = f"{file}: the quantization state of {weight}"
        text = decoded(bytes(np.asarray(self._files.read(f"{weight}.{_STATE}"))), where, CheckpointError)
        state = validated(QuantState, parse_json(text, where, CheckpointError), where, CheckpointError)
        for name, must in (("quant_type", "nf4"), ("blocksize", BLOCK), ("nested_blocksize", NESTED_BLOCK)):
            got = getattr(state, name)
            if got != must:
                raise CheckpointError(f"{where}: {name} must be {must!r}, got {shown(got)}")
        self._check_sizes(weight, state, where)
        if not np.array_equal(np.asarray(self._part(weight, "quant_map"), np.float32), CODE):
            raise CheckpointError(f"{file}: {weight} uses another code book than NF4's")
        return state

    def _check_sizes(self, weight: str, state: QuantState, where: str) -> None:
        """That the codes and their scales are as many as the shape needs."""
        out, in_ = state.shape
        blocks = -(-out * in_ // BLOCK)
        must = {weight: -(-out * in_ // 2), f"{weight}.absmax": blocks}
        if state.nested_offset is not None:
            must[f"{weight}.nested_absmax"] = -(-blocks // NESTED_BLOCK)
        for name, count in must.items():
            if name not in self._files.names():
                raise CheckpointError(f"{where}: tensor {name} is missing")
            stored = self._files.read(name)
            size = stored.nbytes if name == weight else stored.size
            if size != count:
                raise CheckpointError(f"{where}: {name} must hold {count} values for the shape {state.shape}, got {size}")


def dequantized(weight: NF4) -> np.ndarray:
    """The float32 weight ``[out, in]`` that an NF4 of numpy arrays stands for."""
    count = weight.shape[0] * weight.shape[1]
    scales = np.asarray(weight.absmax, np.float32)
    if weight.nested is not None:
        outer = np.repeat(weight.nested.absmax, NESTED_BLOCK)[: weight.absmax.size]
        scales = weight.nested.code[weight.absmax.reshape(-1)] * outer + weight.nested.offset
    values = np.stack([CODE[weight.codes >> 4], CODE[weight.codes & 15]], axis=-1).reshape(-1)[:count]
    return (values * np.repeat(scales.reshape(-1), BLOCK)[:count]).astype(np.float32).reshape(weight.shape)


def is_bnb4bit(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that bitsandbytes quantized the checkpoint to 4 bits."""
    quantization = config.get("quantization_config") or {}
    return quantization.get("quant_method") == "bitsandbytes" and bool(quantization.get("load_in_4bit"))
