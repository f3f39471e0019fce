"""Attention by its definition, in float64: one query at a time over the keys that it sees."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int


def attention(
    q: Float64[torch.Tensor, "batch q_length heads head_dim"],
    k: Float64[torch.Tensor, "batch kv_length kv_heads head_dim"],
    v: Float64[torch.Tensor, "batch kv_length kv_heads head_dim"],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    q_segments: Int[torch.Tensor, "batch q_length"] | None = None,
    kv_segments: Int[torch.Tensor, "batch kv_length"] | None = None,
    q_offset: int = 0,
) -> Float64[torch.Tensor, "batch q_length heads head_dim"]:
    """As the contract says; each query gathers its visible keys, so there is no mask to get wrong the same way."""
    batch, q_length, heads, _ = q.shape
    group = heads // k.shape[2]
    if kv_segments is None:
        kv_segments = q_segments
    rows = []
    for b in range(batch):
        for i in range(q_length):
            slot = q_offset + i
            first = 0 if window is None else max(slot - window + 1, 0)
            last = slot if causal else k.shape[1] - 1 if window is None else min(slot + window - 1, k.shape[1] - 1)
            seen = list(range(first, min(last, k.shape[1] - 1) + 1))
            if q_segments is not None and kv_segments is not None:
                mine = int(q_segments[b, i])
                seen = [j for j in seen if mine != 0 and int(kv_segments[b, j]) == mine]
            if not seen:
                rows.append(torch.zeros_like(q[b, i]))
                continue
            keys = k[b, seen].repeat_interleave(group, dim=1)
            values = v[b, seen].repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,jhd->hj", q[b, i], keys) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
            rows.append(torch.einsum("hj,jhd->hd", weights / weights.sum(dim=1, keepdim=True), values))
    # Of no queries the result is nothing, but it depends on its inputs all the same.
    return torch.stack(rows).view(q.shape) if rows else q * (k.sum() + v.sum())
