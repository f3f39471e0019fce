"""The adapted linear layer in plain torch, with a backward that rebuilds what the forward threw away."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32
from torch.autograd.function import once_differentiable

from jaxsloth.kernels.dropout.contract import kept_scale
from jaxsloth.kernels.dropout.torch_ops import keep_mask
from jaxsloth.kernels.lora_matmul.contract import Dropout
from jaxsloth.kernels.nf4.contract import DEQUANTIZE, NF4
from jaxsloth.kernels.registry import Target, resolve
from jaxsloth.kernels.torch_matmul import matmul_float32


def _dense(base: torch.Tensor | NF4, dtype: torch.dtype) -> torch.Tensor:
    """The base ``[out, in]`` in the compute dtype, for one use."""
    if isinstance(base, NF4):
        target = Target(platform=base.codes.device.type, dtype=str(dtype).removeprefix("torch."))
        return resolve(DEQUANTIZE, "torch", target)(base, dtype)
    return base.to(dtype)


def _drop(x: torch.Tensor, dropout: Dropout | None, like: torch.Tensor) -> torch.Tensor:
    """`x`, flat ``[tokens, in]``, with the mask of `like` ``[batch, length, in]`` applied and the rest scaled up."""
    if dropout is None:
        return x
    _, length, channels = like.shape
    keep = keep_mask(dropout.key, dropout.rows, length, channels, rate=dropout.rate)
    return torch.where(keep.view(-1, channels), x * kept_scale(dropout.rate), 0.0)


class _LoraMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: torch.Tensor | NF4,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: float,
        dropout: Dropout | None,
    ) -> torch.Tensor:
        # Without an adapter nothing of x is needed again.
        ctx.save_for_backward(None if lora_a is None else x, lora_a, lora_b)
        # Neither is a tensor that autograd tracks: the base is frozen.
        ctx.base, ctx.dropout = base, dropout
        ctx.scale, ctx.bias_dtype = scale, None if bias is None else bias.dtype
        flat = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(flat, _dense(base, x.dtype), None if bias is None else bias.to(x.dtype))
        if lora_a is not None and lora_b is not None:
            low = _drop(flat, dropout, x) @ lora_a.to(x.dtype).T
            y.addmm_(low, (scale * lora_b).to(x.dtype).T)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, lora_a, lora_b = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dy @ _dense(ctx.base, dy.dtype) if needs_x else None
        da = db = None
        if lora_a is not None:
            flat, a = x.reshape(-1, x.shape[-1]), lora_a.to(x.dtype)
            g = dy @ (ctx.scale * lora_b).to(x.dtype)
            if needs_a or needs_b:
                dropped = _drop(flat, ctx.dropout, x)
                da = matmul_float32(g.T, dropped) if needs_a else None
                db = matmul_float32(dy.T, dropped @ a.T).mul_(ctx.scale) if needs_b else None
            if dx is not None and ctx.dropout is None:
                dx.addmm_(g, a)
            elif dx is not None:
                dx += _drop(g @ a, ctx.dropout, x)
        dbias = dy.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        return None if dx is None else dx.view(*grads[0].shape[:-1], dx.shape[-1]), None, da, db, dbias, None, None


def lora_matmul(
    x: Float[torch.Tensor, "*lead in"],
    base: Float[torch.Tensor, "out in"] | NF4,
    lora_a: Float32[torch.Tensor, "r in"] | None = None,
    lora_b: Float32[torch.Tensor, "out r"] | None = None,
    *,
    scale: float = 1.0,
    bias: Float[torch.Tensor, " out"] | None = None,
    dropout: Dropout | None = None,
) -> Float[torch.Tensor, "*lead out"]:
    """A frozen linear layer and its adapter; formulas, dtypes and gradients are the contract's.

    Raises:
        ValueError: one of lora_a and lora_b without the other, a trained dense base, or dropout on an x that is not
            ``[batch, length, in]``.
    """
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b belong together: pass both or neither")
    if isinstance(base, torch.Tensor) and base.requires_grad:
        raise ValueError(
            "the base of lora_matmul is frozen, and this one requires a gradient: call requires_grad_(False) on it"
        )
    if dropout is not None and x.dim() != 3:
        raise ValueError(
            f"dropout draws its mask by row, position and channel, so x must be [batch, length, in]; got {tuple(x.shape)}"
        )
    if dropout is not None and dropout.rate == 0.0:
        dropout = None
    return _LoraMatmul.apply(x, base, lora_a, lora_b, bias, scale, dropout)
