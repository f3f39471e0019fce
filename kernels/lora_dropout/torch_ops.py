"""LoRA's A behind a dropout in plain torch; masks are drawn a module at a time and thrown away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32
from torch.autograd.function import once_differentiable

from jaxsloth.kernels.dropout.contract import kept_scale
from jaxsloth.kernels.dropout.torch_ops import keep_tokens
from jaxsloth.kernels.lora_dropout.contract import Masks
from jaxsloth.kernels.torch_matmul import add_matmul_float32, matmul_float32


def keeps(masks: Masks, tokens: int, channels: int) -> Iterator[tuple[slice, Bool[torch.Tensor, "tokens in"]]]:
    """Each module's columns of xa, and what of x it keeps."""
    flat = torch.arange(masks.first, masks.first + tokens, device=masks.rows.device)
    rows, positions = masks.rows[flat // masks.length], flat % masks.length
    first, second = masks.key.unbind()
    for place, word in zip(masks.places, masks.modules.unbind(), strict=True):
        yield place, keep_tokens(torch.stack([first ^ word, second]), rows, positions, channels, rate=masks.rate)


@torch.no_grad()
def project(
    x: Float[torch.Tensor, "tokens wide"],
    a_packed: Float[torch.Tensor, "pad in"],
    masks: Masks,
    *,
    out: Float[torch.Tensor, "tokens pad"] | None = None,
) -> Float[torch.Tensor, "tokens pad"]:
    """See the contract."""
    pad, channels = a_packed.shape
    out = x.new_empty(x.shape[0], pad) if out is None else out
    x, scale = x[:, :channels], kept_scale(masks.rate)
    for place, keep in keeps(masks, x.shape[0], channels):
        out[:, place] = matmul_float32(torch.where(keep, x, 0.0), a_packed[place].T) * scale
    out[:, masks.rank :] = 0.0
    return out


@torch.no_grad()
def input_gradient(
    dx: Float[torch.Tensor, "tokens in"],
    g: Float[torch.Tensor, "tokens pad"],
    a_packed: Float[torch.Tensor, "pad in"],
    masks: Masks,
) -> Float[torch.Tensor, "tokens in"]:
    """See the contract."""
    total, scale = dx.float(), kept_scale(masks.rate)
    for place, keep in keeps(masks, *dx.shape):
        total = total + torch.where(keep, matmul_float32(g[:, place], a_packed[place]), 0.0) * scale
    return dx.copy_(total)


@torch.no_grad()
def gradient_a(
    g: Float[torch.Tensor, "tokens pad"],
    x: Float[torch.Tensor, "tokens wide"],
    masks: Masks,
    totals: Sequence[Float32[torch.Tensor, "_ in"]],
) -> None:
    """See the contract."""
    x, scale = x[:, : totals[0].shape[1]], kept_scale(masks.rate)
    for (place, keep), total in zip(keeps(masks, *x.shape), totals, strict=True):
        add_matmul_float32(total, g[:, place].T, torch.where(keep, x, 0.0), scale=scale)


class _LoraDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, masks: Masks, products: Any) -> torch.Tensor:
        ctx.save_for_backward(x, a)
        ctx.masks, ctx.products = masks, products
        return products.project(x, a.to(x.dtype), masks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a = ctx.saved_tensors
        g, dx, da = grads[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx = ctx.products.input_gradient(torch.zeros_like(x), g, a.to(x.dtype), ctx.masks)
        if ctx.needs_input_grad[1]:
            da = torch.zeros_like(a)
            ctx.products.gradient_a(g, x, ctx.masks, da.split(list(ctx.masks.ranks)))
        return dx, da, None, None


def differentiable(
    x: Float[torch.Tensor, "tokens in"], a: Float32[torch.Tensor, "rank in"], masks: Masks, products: Any
) -> Float[torch.Tensor, "tokens rank"]:
    """`lora_dropout` by a module's products."""
    return _LoraDropout.apply(x, a, masks, products)


def lora_dropout(
    x: Float[torch.Tensor, "tokens in"], a: Float32[torch.Tensor, "rank in"], masks: Masks
) -> Float[torch.Tensor, "tokens rank"]:
    """See the contract."""
    return differentiable(x, a, masks, _Plain)


class _Plain:
    project, input_gradient, gradient_a = project, input_gradient, gradient_a
