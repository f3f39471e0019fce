"""Attention in plain torch: torch's own fused product where it can express the scores, a softmax where it can't."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch.nn.functional import scaled_dot_product_attention

from jaxsloth.kernels.rope.torch_ops import rotate


def _visible(
    q_length: int,
    kv_length: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    q_segments: torch.Tensor | None,
    kv_segments: torch.Tensor | None,
    q_offset: int | torch.Tensor,
) -> Bool[torch.Tensor, "rows #q_length #kv_length"] | None:
    """Which key each query sees; None where all see all."""
    distance = (torch.arange(q_length, device=device) + q_offset)[:, None] - torch.arange(kv_length, device=device)
    visible = None
    if causal:
        visible = distance >= 0
    if window is not None:
        near = distance < window if causal else distance.abs() < window
        visible = near if visible is None else visible & near
    visible = None if visible is None else visible[None]
    if q_segments is not None:
        kv_segments = q_segments if kv_segments is None else kv_segments
        same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (q_segments[:, :, None] != 0)
        visible = same if visible is None else visible & same
    return visible


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scale: float, soft_cap: float
) -> torch.Tensor:
    """Softmax attention with capped scores; q ``[batch, heads, q_length, head_dim]``, k and v with as many heads."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def check_arguments(
    q: torch.Tensor, k: torch.Tensor, q_segments: torch.Tensor | None, kv_segments: torch.Tensor | None
) -> None:
    """Refuses what no implementation of `attention` can read; see there."""
    heads, kv_heads, q_length, kv_length = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
    if q_segments is None and kv_segments is not None:
        raise ValueError("kv_segments came without q_segments: pass the queries' segments too")
    if q_segments is not None and kv_segments is None and q_length != kv_length:
        raise ValueError(f"q_segments [{q_length}] can't stand for {kv_length} keys: pass kv_segments")


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
    """Grouped-query attention; masks, dtypes and the zeros of a query that sees nothing are the contract's.

    Raises:
        ValueError: heads is not a multiple of kv_heads, segments are given for the keys only, or q_segments has to serve
            for keys of another length.
    """
    check_arguments(q, k, q_segments, kv_segments)
    heads, kv_heads, q_length, kv_length = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = heads != kv_heads
    square = causal and q_length == kv_length and isinstance(q_offset, int) and q_offset == 0
    if square and window is None and q_segments is None and soft_cap is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
    visible = _visible(q_length, kv_length, q.device, causal, window, q_segments, kv_segments, q_offset)
    blind = None
    if visible is not None:
        visible = visible[:, None]
        blind = ~visible.any(dim=-1, keepdim=True)
        # A softmax over nothing is not a number: such a query looks at everything, and its result is then cleared.
        visible = visible | blind
    if grouped:
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    if soft_cap is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    else:
        out = _capped(q, k, v, visible, scale, soft_cap)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2)


@torch.no_grad()
def append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot: torch.Tensor,
) -> None:
    """One token's keys and values into the caches; see the contract."""
    if tables is not None:
        rotate(q, k, *tables, q, k, head_dim=keys.shape[3])
    for cache, new in ((keys, k), (values, v)):
        cache.index_copy_(1, slot, new.reshape(new.shape[0], 1, *cache.shape[2:]))


@torch.no_grad()
def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    slot: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attention of one query a row over the caches; see the contract."""
    batch, capacity, _, head_dim = keys.shape
    slots = torch.arange(capacity, device=q.device)
    seen = ((slots >= first[:, None]) & (slots <= slot)).int()
    out = attention(
        q.reshape(batch, 1, -1, head_dim),
        keys,
        values,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        q_segments=seen.new_ones(batch, 1),
        kv_segments=seen,
        q_offset=slot[0],
    )
    return out.reshape(batch, -1)
