"""Rotary embedding by its formula, in float64: pairs of channels as complex numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float64


def rope(
    x: Float64[torch.Tensor, "batch length heads head_dim"],
    cos: Float64[torch.Tensor, "batch length half"],
    sin: Float64[torch.Tensor, "batch length half"],
) -> Float64[torch.Tensor, "batch length heads head_dim"]:
    """Channel i and channel ``i + half`` are the real and imaginary part of what is multiplied by ``cos + i·sin``."""
    half = cos.shape[-1]
    pair = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous())
    turned = pair * torch.complex(cos, sin)[:, :, None, :]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)
