"""Rotary embedding in plain torch; nothing of x is kept for the backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch.autograd.function import once_differentiable


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype)[:, :, None, :], sin.to(x.dtype)[:, :, None, :]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def rope(
    x: Float[torch.Tensor, "batch length heads head_dim"],
    cos: Float32[torch.Tensor, "batch length half"],
    sin: Float32[torch.Tensor, "batch length half"],
) -> Float[torch.Tensor, "batch length heads head_dim"]:
    """Turn the first ``2 * half`` channels of every head by the angles whose cosines and sines are given.

    Raises:
        ValueError: the tables turn more channels than a head has.
    """
    check_tables(x, cos)
    return _Rope.apply(x, cos, sin)


def check_tables(x: torch.Tensor, cos: torch.Tensor) -> None:
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"the tables turn {2 * cos.shape[-1]} channels, and a head has {x.shape[-1]}")


@torch.no_grad()
def rotate(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    *,
    head_dim: int,
    backward: bool = False,
) -> None:
    """Queries ``[tokens, heads·head_dim]`` and keys ``[tokens, kv_heads·head_dim]``, of any row stride, turned together.

    cos and sin ``[tokens, half]`` float32; the outputs may be the inputs. backward turns by the opposite angle.
    """
    for source, target in ((q, q_out), (k, k_out)):
        if source is not None and target is not None:
            heads = source.reshape(1, source.shape[0], -1, head_dim)
            target.copy_(_rotate(heads, cos[None], (-sin if backward else sin)[None]).view(target.shape))


@torch.no_grad()
def tables(
    positions: Int[torch.Tensor, "batch length"],
    inverse_frequencies: Float32[torch.Tensor, " half"],
    attention_scaling: float = 1.0,
) -> tuple[Float32[torch.Tensor, "batch length half"], Float32[torch.Tensor, "batch length half"]]:
    """Cosines and sines of ``position * inverse frequency``, times `attention_scaling`; angles are float32."""
    angles = positions[..., None].float() * inverse_frequencies
    return angles.cos() * attention_scaling, angles.sin() * attention_scaling
