"""Rotary embedding of queries and keys together, as Triton kernels: one program a token, every head read and written once.

With c = cos and s = sin of a token: ``(a, b) -> (a·c - b·s, b·c + a·s)`` for channels i and i + half of each head; the backward
is the same with -s. Products are in float32 and rounded once; the tables are rounded to the data's dtype first.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch.autograd.function import once_differentiable

from jaxsloth.kernels.rope.torch_ops import check_tables

LAUNCH = {"num_warps": 4}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def _turn(source, target, cos, sin, heads, head_dim, half, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """Rotates one token's heads; channels from 2·half on are copied where source and target differ."""
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (channel < half)
    place = head * head_dim + channel
    first = tl.load(source + place, mask=inside, other=0.0)
    second = tl.load(source + place + half, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    tl.store(target + place, (a * cos - b * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(target + place + half, (b * cos + a * sin).to(target.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = tl.arange(0, REST)[None, :] + 2 * half
        kept = (head < heads) & (rest < head_dim)
        tl.store(target + head * head_dim + rest, tl.load(source + head * head_dim + rest, mask=kept), mask=kept)


@triton.jit
@no_type_check
def rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_stride,
    k_stride,
    q_out_stride,
    k_out_stride,
    heads,
    kv_heads,
    head_dim,
    half,
    sign,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HALF)
    inside = channel < half
    # transformers rounds the tables to the data's dtype.
    c = tl.load(cos + row * half + channel, mask=inside, other=0.0).to(q.dtype.element_ty).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + channel, mask=inside, other=0.0).to(q.dtype.element_ty).to(tl.float32)[None, :] * sign
    _turn(q + row * q_stride, q_out + row * q_out_stride, c, s, heads, head_dim, half, HEADS, HALF, REST)
    if KV_HEADS > 0:
        _turn(k + row * k_stride, k_out + row * k_out_stride, c, s, kv_heads, head_dim, half, KV_HEADS, HALF, REST)


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
    """As torch_ops' function of this name."""
    tokens, half = q.shape[0], cos.shape[-1]
    if tokens == 0:
        return
    heads, kv_heads = q.shape[1] // head_dim, 0 if k is None else k.shape[1] // head_dim
    in_place = q.data_ptr() == q_out.data_ptr()
    rest = 0 if in_place else head_dim - 2 * half
    keys, keys_out = q if k is None else k, q_out if k_out is None else k_out
    with torch.cuda.device_of(q):
        rotate_kernel[(tokens,)](
            q,
            keys,
            q_out,
            keys_out,
            cos,
            sin,
            q.stride(0),
            keys.stride(0),
            q_out.stride(0),
            keys_out.stride(0),
            heads,
            kv_heads,
            head_dim,
            half,
            -1.0 if backward else 1.0,
            HEADS=triton.next_power_of_2(heads),
            KV_HEADS=triton.next_power_of_2(kv_heads) if kv_heads else 0,
            HALF=triton.next_power_of_2(half),
            REST=triton.next_power_of_2(rest) if rest else 0,
            **LAUNCH,
        )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _whole(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _whole(grads[0], cos, sin, backward=True), None, None


def _whole(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backward: bool) -> torch.Tensor:
    batch, length, heads, head_dim = x.shape
    rows = x.reshape(batch * length, heads * head_dim)
    out = torch.empty_like(rows)
    tables = (table.contiguous().view(batch * length, cos.shape[-1]) for table in (cos, sin))
    rotate(rows, None, *tables, out, None, head_dim=head_dim, backward=backward)
    return out.view(x.shape)


def rope(
    x: Float[torch.Tensor, "batch length heads head_dim"],
    cos: Float32[torch.Tensor, "batch length half"],
    sin: Float32[torch.Tensor, "batch length half"],
) -> Float[torch.Tensor, "batch length heads head_dim"]:
    """As torch_ops' function of this name, on CUDA."""
    check_tables(x, cos)
    return _Rope.apply(x, cos, sin)
