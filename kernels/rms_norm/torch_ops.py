"""RMSNorm in plain torch, keeping one float32 number a row beside its inputs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        normalised = wide * rstd
        if offset == 0.0:
            return (normalised.to(x.dtype) * weight).to(x.dtype)
        return (normalised * (offset + weight.float())).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy, n = grads[0].float(), x.float() * rstd
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            g = dy * (ctx.offset + weight.float())
            dx = (rstd * (g - n * (g * n).mean(dim=-1, keepdim=True))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (dy * n).reshape(-1, x.shape[-1]).sum(dim=0).to(weight.dtype)
        return dx, dweight, None, None


def rms_norm(
    x: Float[torch.Tensor, "*lead hidden"], weight: Float[torch.Tensor, " hidden"], *, eps: float, offset: float = 0.0
) -> Float[torch.Tensor, "*lead hidden"]:
    """Normalise the last axis to a root mean square of one and scale it by ``offset + weight``; x's dtype is kept."""
    return _RMSNorm.apply(x, weight, eps, offset)


@torch.no_grad()
def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """The norm of a residual stream: ``total = x + delta`` where a delta is given, ``y = rms_norm(total)``.

    x, delta, y and total ``[rows, hidden]`` may have any row stride. Returns the float32 reciprocals, ``[rows]``.
    """
    if delta is not None and total is not None:
        x = torch.add(x, delta, out=total)
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    normalised = wide * rstd
    y.copy_((normalised.to(x.dtype) * weight).to(x.dtype) if offset == 0.0 else normalised * (offset + weight.float()))
    return rstd[:, 0]


@torch.no_grad()
def add_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual: torch.Tensor | None,
    dx: torch.Tensor | None,
    *,
    offset: float = 0.0,
    needs_dweight: bool = False,
) -> torch.Tensor | None:
    """Writes ``dx = residual + (the norm's gradient)``; returns dweight where it is needed.

    x is what was normalised, residual the gradient that comes along the residual stream, or None. dx may be residual.
    """
    wide, n = dy.float(), x.float() * rstd[:, None]
    if dx is not None:
        g = wide * (offset + weight.float())
        own = (rstd[:, None] * (g - n * (g * n).mean(dim=-1, keepdim=True))).to(x.dtype)
        dx.copy_(own if residual is None else residual + own)
    return (wide * n).sum(dim=0).to(weight.dtype) if needs_dweight else None
