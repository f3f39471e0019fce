"""LayerNorm by its formula, in float64."""

from __future__ import annotations

import torch
from jaxtyping import Float64


def layer_norm(
    x: Float64[torch.Tensor, "*lead hidden"],
    weight: Float64[torch.Tensor, " hidden"],
    bias: Float64[torch.Tensor, " hidden"] | None = None,
    *,
    eps: float,
) -> Float64[torch.Tensor, "*lead hidden"]:
    """``(x - mean(x)) / sqrt(mean((x - mean(x))²) + eps) * weight + bias``."""
    centred = x - x.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt(centred.pow(2).mean(dim=-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias
