"""A product of two half-precision matrices whose result stays in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32


def matmul_float32(a: Float[torch.Tensor, "m k"], b: Float[torch.Tensor, "k n"]) -> Float32[torch.Tensor, "m n"]:
    """``a @ b`` of one dtype, accumulated and returned in float32.

    CUDA's product takes half-precision operands as they are; elsewhere torch has none with another result dtype, so they
    are read as float32 first.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul_float32(
    total: Float32[torch.Tensor, "m n"],
    a: Float[torch.Tensor, "m k"],
    b: Float[torch.Tensor, "k n"],
    *,
    scale: float = 1.0,
) -> None:
    """``total += scale · a @ b``, accumulated in float32, in place."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, alpha=scale)
    elif a.is_cuda:
        torch.addmm(total, a, b, alpha=scale, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float(), alpha=scale)
