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
