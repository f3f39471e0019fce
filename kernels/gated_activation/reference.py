"""Gated activation by its formula, in float64."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64


def gated_activation(
    gate: Float64[torch.Tensor, "*lead width"], up: Float64[torch.Tensor, "*lead width"], *, kind: str
) -> Float64[torch.Tensor, "*lead width"]:
    """``act(gate) * up``; gelu_tanh is Hendrycks & Gimpel 2016 (arXiv:1606.08415), §2."""
    if kind == "silu":
        activated = gate / (1.0 + torch.exp(-gate))
    elif kind == "gelu":
        activated = gate * 0.5 * torch.erfc(-gate / math.sqrt(2.0))
    elif kind == "gelu_tanh":
        activated = 0.5 * gate * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        activated = gate.clamp(min=0.0)
    return activated * up
