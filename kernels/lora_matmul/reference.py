"""The adapted linear layer by its formula, in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64

from jaxsloth.kernels.dropout.contract import kept_scale


def lora_matmul(
    x: Float64[torch.Tensor, "*lead in"],
    weight: Float64[torch.Tensor, "out in"],
    lora_a: Float64[torch.Tensor, "r in"] | None = None,
    lora_b: Float64[torch.Tensor, "out r"] | None = None,
    *,
    scale: float = 1.0,
    bias: Float64[torch.Tensor, " out"] | None = None,
    keep: Bool[torch.Tensor, "*lead in"] | None = None,
    rate: float = 0.0,
) -> Float64[torch.Tensor, "*lead out"]:
    """``x·Wᵀ + bias + scale · dropout(x)·Aᵀ·Bᵀ`` with a dense W; `keep` is the mask of a dropout at `rate`."""
    y = torch.einsum("...i,oi->...o", x, weight)
    if bias is not None:
        y = y + bias
    if lora_a is None or lora_b is None:
        return y
    dropped = x if keep is None else x * keep * kept_scale(rate)
    return y + scale * torch.einsum("...i,ri,or->...o", dropped, lora_a, lora_b)
