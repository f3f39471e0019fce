"""One token a row against a KV cache, as Triton kernels that read every changing number from the device (see the contract).

`append` takes a program a head. `attend` gives a program one key head of one row, with all query heads that read it, and a part
of the slots: it leaves a softmax over its part (largest score, sum, unnormalised output, float32), and a second kernel joins
the parts that have been reached. Parts beyond the present slot end at once, so a long cache costs what is in it.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

TILE = 64  # slots handled at once
PARTS = 64  # that a cache is cut into at most
LAUNCH = {"num_warps": 4, "num_stages": 1}
SMALL = {"num_warps": 1}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def append_kernel(
    q,
    k,
    v,
    cos,
    sin,
    keys,
    values,
    slot,
    heads,
    kv_heads,
    head_dim,
    half,
    capacity,
    q_stride,
    k_stride,
    v_stride,
    TURNS: tl.constexpr,
    DIM: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, DIM)
    inside = channel < head_dim
    own = ((row * capacity + tl.load(slot)) * kv_heads) * head_dim
    if head >= heads + kv_heads:
        head -= heads + kv_heads
        kept = tl.load(v + row * v_stride + head * head_dim + channel, mask=inside)
        tl.store(values + own + head * head_dim + channel, kept, mask=inside)
    else:
        source, target = q + row * q_stride + head * head_dim, q + row * q_stride + head * head_dim
        if head >= heads:
            head -= heads
            source, target = k + row * k_stride + head * head_dim, keys + own + head * head_dim
        value = tl.load(source + channel, mask=inside, other=0.0)
        if TURNS:
            # Channel i turns with i + half; what lies behind the two halves stays.
            first, turned = channel < half, channel < 2 * half
            partner = tl.where(first, channel + half, channel - half)
            other = tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
            place = row * half + tl.where(first, channel, channel - half)
            # transformers rounds the tables to the data's dtype.
            c = tl.load(cos + place, mask=turned, other=1.0).to(q.dtype.element_ty).to(tl.float32)
            s = tl.load(sin + place, mask=turned, other=0.0).to(q.dtype.element_ty).to(tl.float32)
            # All is read before anything of it is overwritten: q turns in place.
            tl.debug_barrier()
            value = (value.to(tl.float32) * c + tl.where(first, -other, other) * s).to(q.dtype.element_ty)
        tl.store(target + channel, value, mask=inside)


@triton.jit
@no_type_check
def attend_kernel(
    q,
    keys,
    values,
    first,
    slot,
    outs,
    peaks,
    sums,
    heads,
    kv_heads,
    head_dim,
    capacity,
    span,
    q_stride,
    scale,
    window,
    cap,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row, kv_head, part = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    last, begin = tl.load(slot).to(tl.int32), tl.load(first + row)
    if WINDOWED:
        begin = tl.maximum(begin, last - window + 1)
    start = part * span
    end = tl.minimum(start + span, last + 1)
    size = heads // kv_heads
    member, channel = tl.arange(0, GROUP), tl.arange(0, DIM)
    inside = channel < head_dim
    head = kv_head * size + member
    mask = (member < size)[:, None] & inside[None, :]
    query = tl.load(q + row.to(tl.int64) * q_stride + head[:, None] * head_dim + channel[None, :], mask=mask, other=0.0)
    base = (row.to(tl.int64) * capacity * kv_heads + kv_head) * head_dim
    peak, total = tl.full((GROUP,), -1e30, tl.float32), tl.zeros((GROUP,), tl.float32)
    out = tl.zeros((GROUP, DIM), tl.float32)
    for tile in range(start, end, SLOTS):
        place = tile + tl.arange(0, SLOTS)
        seen = (place >= begin) & (place < end)
        offset = base + place.to(tl.int64)[:, None] * (kv_heads * head_dim) + channel[None, :]
        key = tl.load(keys + offset, mask=seen[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weight = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        faded = tl.exp(peak - higher)
        total = total * faded + tl.sum(weight, axis=1)
        value = tl.load(values + offset, mask=seen[:, None] & inside[None, :], other=0.0)
        out = tl.dot(weight.to(value.dtype), value, out * faded[:, None], input_precision="ieee")
        peak = higher
    place = (part * tl.num_programs(0) // kv_heads + row) * heads + head
    tl.store(peaks + place, peak, mask=member < size)
    tl.store(sums + place, total, mask=member < size)
    tl.store(outs + place[:, None] * head_dim + channel[None, :], out, mask=mask)


@triton.jit
@no_type_check
def join_kernel(outs, peaks, sums, slot, out, head_dim, span, DIM: tl.constexpr):
    head, every = tl.program_id(0), tl.num_programs(0)
    channel = tl.arange(0, DIM)
    inside = channel < head_dim
    peak, total = -1e30, 0.0
    result = tl.zeros((DIM,), tl.float32)
    for part in range(tl.load(slot).to(tl.int32) // span + 1):
        place = part * every + head
        own = tl.load(peaks + place)
        higher = tl.maximum(peak, own)
        faded, weight = tl.exp(peak - higher), tl.exp(own - higher)
        total = total * faded + tl.load(sums + place) * weight
        result = result * faded + tl.load(outs + place * head_dim + channel, mask=inside, other=0.0) * weight
        peak = higher
    tl.store(out + head * head_dim + channel, (result / total).to(out.dtype.element_ty), mask=inside)


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
    """As torch_ops' function of this name, on CUDA."""
    batch, capacity, kv_heads, head_dim = keys.shape
    heads = q.shape[1] // head_dim
    cos, sin = (q, q) if tables is None else tables  # never read where nothing turns
    with torch.cuda.device_of(q):
        append_kernel[(batch, heads + 2 * kv_heads)](
            q,
            k,
            v,
            cos,
            sin,
            keys,
            values,
            slot,
            heads,
            kv_heads,
            head_dim,
            0 if tables is None else cos.shape[1],
            capacity,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            TURNS=tables is not None,
            DIM=triton.next_power_of_2(head_dim),
            **SMALL,
        )


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
    """As torch_ops' function of this name, on CUDA; keys and values are contiguous."""
    batch, capacity, kv_heads, head_dim = keys.shape
    heads = q.shape[1] // head_dim
    span = triton.cdiv(triton.cdiv(capacity, PARTS), TILE) * TILE
    parts = triton.cdiv(capacity, span)
    outs = torch.empty(parts, batch * heads, head_dim, dtype=torch.float32, device=q.device)
    peaks, sums = (torch.empty(parts, batch * heads, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty(batch, heads * head_dim, dtype=q.dtype, device=q.device)
    width = max(triton.next_power_of_2(head_dim), 16)
    with torch.cuda.device_of(q):
        attend_kernel[(batch * kv_heads, parts)](
            q,
            keys,
            values,
            first,
            slot,
            outs,
            peaks,
            sums,
            heads,
            kv_heads,
            head_dim,
            capacity,
            span,
            q.stride(0),
            scale,
            window or 0,
            soft_cap or 1.0,
            WINDOWED=window is not None,
            CAPPED=soft_cap is not None,
            GROUP=max(triton.next_power_of_2(heads // kv_heads), 16),
            DIM=width,
            SLOTS=TILE,
            **LAUNCH,
        )
        join_kernel[(batch * heads,)](outs, peaks, sums, slot, out, head_dim, span, DIM=width, **SMALL)
    return out
