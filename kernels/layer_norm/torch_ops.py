"""LayerNorm in plain torch, keeping two float32 numbers a row beside its inputs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch.autograd.function import once_differentiable


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        wide = x.float()
        mean = wide.mean(dim=-1, keepdim=True)
        centred = wide - mean
        rstd = torch.rsqrt(centred.pow(2).mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = centred * rstd * weight.float()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy, n = grads[0].float(), (x.float() - mean) * rstd
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            g = dy * weight.float()
            dn = g - g.mean(dim=-1, keepdim=True) - n * (g * n).mean(dim=-1, keepdim=True)
            dx = (rstd * dn).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy * n).reshape(-1, x.shape[-1]).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, x.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
        return dx, dweight, dbias, None


def layer_norm(
    x: Float[torch.Tensor, "*lead hidden"],
    weight: Float[torch.Tensor, " hidden"],
    bias: Float[torch.Tensor, " hidden"] | None = None,
    *,
    eps: float,
) -> Float[torch.Tensor, "*lead hidden"]:
    """Normalise the last axis to mean 0 and variance 1, scale by `weight` and shift by `bias`; x's dtype is kept."""
    return _LayerNorm.apply(x, weight, bias, eps)
