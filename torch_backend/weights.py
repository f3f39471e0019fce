"""Tensors on their way in: read from a checkpoint, checked, on the device, quantized where the spec says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from jaxsloth.backend import TensorSource
from jaxsloth.convert.fitting import cast_error
from jaxsloth.kernels.nf4.contract import NF4, QUANTIZE, Nested
from jaxsloth.kernels.registry import Target, resolve
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.spec import ModelSpec

GetWeight = Callable[[str], "torch.Tensor | NF4"]


def loader(spec: ModelSpec, source: TensorSource, device: torch.device, dtype: torch.dtype) -> GetWeight:
    """A function that hands over one base tensor at a time: checked, on the device, quantized where the spec says."""
    shapes, present = tensor_shapes(spec), set(source.names())
    nested = spec.quantization.nested if spec.quantization is not None else False
    quantized = {f"{module}.weight" for module in spec.quantization.modules} if spec.quantization is not None else set()
    quantize = resolve(QUANTIZE, "torch", Target(device.type))  # type: ignore[arg-type]

    def get_weight(name: str) -> torch.Tensor | NF4:
        if name not in present:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        if tuple(source.shape(name)) != shapes[name]:
            raise ValueError(f"tensor {name} must have the shape {shapes[name]}, and it has {tuple(source.shape(name))}")
        value = source.read(name)
        if isinstance(value, NF4):
            return map_nf4(lambda array: torch.from_numpy(np.array(array)).to(device), value)
        tensor = to_torch(value).to(device)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds NaN or infinite values; the checkpoint is damaged")
        stored = torch.float32 if name in quantized else dtype
        if torch.finfo(tensor.dtype).max > torch.finfo(stored).max:
            lost = ~torch.isfinite(tensor.to(stored))
            if lost.any():
                raise cast_error(name, int(lost.sum()), float(tensor[lost][0]), str(stored).removeprefix("torch."))
        return quantize(tensor, nested=nested) if name in quantized else tensor.to(dtype)

    return get_weight


def dense(value: torch.Tensor | NF4) -> torch.Tensor:
    """A tensor that must not be quantized."""
    if isinstance(value, NF4):
        raise ValueError("only linear layers of the blocks may be quantized in a checkpoint")
    return value


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same bits; bfloat16, which numpy has not of its own, crosses as integers."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def map_nf4(function: Callable[[Any], Any], quantized: NF4) -> NF4:
    nested = quantized.nested
    if nested is not None:
        nested = Nested(function(nested.absmax), function(nested.offset), function(nested.code))
    return NF4(function(quantized.codes), function(quantized.absmax), nested, quantized.shape)
