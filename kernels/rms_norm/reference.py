"""RMSNorm by its formula, in float64."""

from __future__ import annotations

import torch
from jaxtyping import Float64


def rms_norm(
    x: Float64[torch.Tensor, "*lead hidden"], weight: Float64[torch.Tensor, " hidden"], *, eps: float, offset: float = 0.0
) -> Float64[torch.Tensor, "*lead hidden"]:
    """``x / sqrt(mean(x²) + eps) * (offset + weight)``."""
    return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * (offset + weight)
