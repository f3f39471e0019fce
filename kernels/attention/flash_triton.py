"""Attention in Triton for training, where no library does it: scores with a soft cap (Gemma 2), with all that the contract has.

`forward` and `backward` are functions of their own, so that a caller decides what is kept between them; `attention` is the op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Float, Int
from torch.autograd.function import once_differentiable

from jaxsloth.kernels.attention.flash_kernels import dkv_kernel, dq_kernel, extent_kernel, forward_kernel
from jaxsloth.kernels.attention.torch_ops import check_arguments

UNBOUNDED = 2**30
LOOKED_AT_ONCE = 1024  # segments


@dataclass(frozen=True)
class Tiles:
    """Queries and keys handled at once, and how the program is laid out."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# (forward, dq, dk and dv) by the power of two that holds a head; `benchmarks.tiles` measures others.
HALF = {
    64: (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 3)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 3)),
    256: (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2)),
}
SINGLE = (Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))  # float32: true products, outside the tensor cores


def tiles_for(head_dim: int, dtype: torch.dtype) -> tuple[Tiles, Tiles, Tiles]:
    if dtype == torch.float32:
        return SINGLE
    return HALF[max(triton.next_power_of_2(head_dim), 64)]


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query sees, and how scores are formed: the contract's arguments of these names."""

    scale: float
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    q_segments: torch.Tensor | None = None
    kv_segments: torch.Tensor | None = None
    q_offset: int | torch.Tensor = 0

    @property
    def segments(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.q_segments is None:
            return None
        mine = self.q_segments.contiguous()
        return mine, mine if self.kv_segments is None else self.kv_segments.contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x ``[batch, length, heads, head_dim]`` such that a token's heads lie side by side, and tokens one stride apart."""
    batch, length, heads, head_dim = x.shape
    whole = x.stride(3) == 1 and (heads == 1 or x.stride(2) == head_dim)
    return x if whole and (batch == 1 or x.stride(0) == length * x.stride(1)) else x.contiguous()


def _stride(x: torch.Tensor) -> int:
    """From token to token; of single tokens in a row, from row to row."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _arguments(q: torch.Tensor, k: torch.Tensor, mask: MaskSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(heads, kv_heads, q_length, kv_length, nearest, farthest, scale, cap; what kernels are specialised on)."""
    farthest = UNBOUNDED if mask.window is None else mask.window - 1
    nearest = 0 if mask.causal else -farthest
    numbers = (q.shape[2], k.shape[2], q.shape[1], k.shape[1], nearest, farthest, mask.scale, mask.soft_cap or 1.0)
    head_dim = q.shape[3]
    return numbers, {
        "CAPPED": mask.soft_cap is not None,
        "PACKED": mask.q_segments is not None,
        "TRACED": isinstance(mask.q_offset, torch.Tensor),
        "HEAD_DIM": head_dim,
        "DIM": max(triton.next_power_of_2(head_dim), 16),
    }


def _extents(own: torch.Tensor, others: torch.Tensor, size: int) -> torch.Tensor:
    """int32 ``[batch, tiles, 2]``: from where to where the others have the segments of a tile of `size`."""
    batch, length = own.shape
    count = triton.cdiv(length, size)
    extents = torch.empty(batch, count, 2, dtype=torch.int32, device=own.device)
    extent_kernel[(batch, count)](own, others, extents, length, others.shape[1], SIZE=size, STEP=LOOKED_AT_ONCE)
    return extents


def _sides(q: torch.Tensor, mask: MaskSpec, queries: int | None, keys: int | None) -> tuple[torch.Tensor, ...]:
    """(the segments of queries and keys, the extents for tiles of one of both); where there are none, q, which is not read."""
    if mask.segments is None:
        return q, q, q
    mine, theirs = mask.segments
    extents = _extents(mine, theirs, queries) if queries is not None else _extents(theirs, mine, keys or 1)
    return mine, theirs, extents


@torch.no_grad()
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: MaskSpec, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the output like q, contiguous; the base-2 log-sum-exp of its scores, float32 ``[batch, heads, q_length]``)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, q_length, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_length, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    chosen = tiles or tiles_for(head_dim, q.dtype)[0]
    numbers, settings = _arguments(q, k, mask)
    with torch.cuda.device_of(q):
        sides = _sides(q, mask, chosen.queries, None)
        forward_kernel[(batch * heads, triton.cdiv(q_length, chosen.queries))](
            *(q, k, v, out, lse, *sides, mask.q_offset, _stride(q), _stride(k), _stride(v), _stride(out), *numbers),
            **settings,
            QUERIES=chosen.queries,
            KEYS=chosen.keys,
            **chosen.launch,
        )
    return out, lse


@torch.no_grad()
def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: MaskSpec,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, contiguous; out and lse are what `forward` gave for the same arguments."""
    dout, q, k, v, out = (_rows(t) for t in (dout, q, k, v, out))
    batch, q_length, heads, head_dim = q.shape
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    for_dq, for_dkv = tiles or tiles_for(head_dim, q.dtype)[1:]
    delta = torch.empty_like(lse)
    numbers, settings = _arguments(q, k, mask)
    strides = _stride(q), _stride(k), _stride(v)
    with torch.cuda.device_of(q):
        dq_kernel[(batch * heads, triton.cdiv(q_length, for_dq.queries))](
            *[q, k, v, out, dout, lse, delta, dq, *_sides(q, mask, for_dq.queries, None), mask.q_offset],
            *[*strides, _stride(out), _stride(dout), _stride(dq), *numbers],
            **settings,
            QUERIES=for_dq.queries,
            KEYS=for_dq.keys,
            **for_dq.launch,
        )
        dkv_kernel[(batch * k.shape[2], triton.cdiv(k.shape[1], for_dkv.keys))](
            *[q, k, v, dout, lse, delta, dk, dv, *_sides(q, mask, None, for_dkv.keys), mask.q_offset],
            *[*strides, _stride(dout), _stride(dk), _stride(dv), *numbers],
            **settings,
            QUERIES=for_dkv.queries,
            KEYS=for_dkv.keys,
            **for_dkv.launch,
        )
    return dq, dk, dv


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: MaskSpec) -> torch.Tensor:
        out, lse = forward(q, k, v, mask)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = mask
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *backward(grads[0], q, k, v, out, lse, ctx.mask), None


def attention(
    q: Float[torch.Tensor, "batch q_length heads head_dim"],
    k: Float[torch.Tensor, "batch kv_length kv_heads head_dim"],
    v: Float[torch.Tensor, "batch kv_length kv_heads head_dim"],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    q_segments: Int[torch.Tensor, "batch q_length"] | None = None,
    kv_segments: Int[torch.Tensor, "batch kv_length"] | None = None,
    q_offset: int | Int[torch.Tensor, ""] = 0,
) -> Float[torch.Tensor, "batch q_length heads head_dim"]:
    """As torch_ops' function of this name, on CUDA; keeps q, k, v, the output and a log-sum-exp a row.

    Raises:
        ValueError: as torch_ops' function.
    """
    check_arguments(q, k, q_segments, kv_segments)
    return _Flash.apply(q, k, v, MaskSpec(scale, causal, window, soft_cap, q_segments, kv_segments, q_offset))
