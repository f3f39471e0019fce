"""NF4 by its definition, in float64: what a quantized weight means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64

from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4


def dequantize(quantized: NF4) -> Float64[torch.Tensor, "out in"]:
    """The weight that `quantized` (torch tensors) stands for, with no rounding but that of its stored float32 numbers."""
    out, in_ = quantized.shape
    codes = quantized.codes.reshape(-1).long()
    indices = torch.stack([codes // 16, codes % 16], dim=1).reshape(-1)[: out * in_]
    values = torch.from_numpy(CODE).to(codes.device).double()[indices]
    absmax = quantized.absmax.double()
    if quantized.nested is not None:
        outer = quantized.nested.absmax.double().repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = quantized.nested.code.double()[quantized.absmax.long()] * outer + quantized.nested.offset.double()
    scales = absmax.repeat_interleave(BLOCK)[: out * in_]
    return (values * scales).reshape(out, in_)


def matvec(
    x: Float64[torch.Tensor, "rows in"], weights: Sequence[NF4], bias: Float64[torch.Tensor, " out"] | None = None
) -> Float64[torch.Tensor, "rows out"]:
    """``[x·W0ᵀ, x·W1ᵀ, …] + bias``."""
    y = torch.cat([x @ dequantize(weight).T for weight in weights], dim=1)
    return y if bias is None else y + bias
