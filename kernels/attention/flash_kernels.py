"""FlashAttention-2 (Dao 2023, arXiv:2307.08691) in Triton, with a soft cap, windows, grouped heads and packed documents.

A query at slot i sees key j where ``nearest <= i - j <= farthest`` (causal: nearest is 0; unbounded: ±2**30) and their segments
agree, so one rule gives the mask, the tiles that a program visits and those of them that need no mask. Scores go in base 2.

Forward, a tile of queries a program: a running maximum m and sum l over tiles of keys; ``out = Σ exp2(z - m)·v / l`` and
``lse = m + log2 l`` are left. Backward, with ``p = exp2(z - lse)``, ``z = c·tanh(s/c)·log2 e``, ``s = scale·q·k``:
``δ = Σ dout·out``, ``ds = p·(dout·v - δ)·(1 - tanh²)``, ``dq = scale·Σ ds·k``, ``dk = scale·Σ ds·q``, ``dv = Σ p·dout``. The
kernel of dq leaves δ to the kernel of dk and dv, which adds a key head's group up itself: no atomics, the same bits each run.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)  # finite, so that a row that sees nothing has no NaN in it


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def _rows(base, place, stride, length, CHECKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """``[len(place), DIM]``, zero behind HEAD_DIM and, where CHECKED, from `length` on."""
    channel = tl.arange(0, DIM)
    offset = base + place.to(tl.int64)[:, None] * stride + channel[None, :]
    if CHECKED:
        return tl.load(offset, mask=(place < length)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM < DIM:
        return tl.load(offset, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    return tl.load(offset)


@triton.jit
@no_type_check
def _write(base, place, stride, length, value, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    channel = tl.arange(0, DIM)
    mask = (place < length)[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(base + place.to(tl.int64)[:, None] * stride + channel[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _soft_capped(scores, scale, cap, CAPPED: tl.constexpr):
    """(The scores in base 2, behind scale and cap; f, of which the cap's derivative is ``4·f·(1 - f)``)."""
    scores *= scale
    fall = scores
    if CAPPED:
        fall = 1.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2_E / cap)))  # tanh(x) = 1 - 2 / (1 + exp(2x))
        scores = cap * (1.0 - 2.0 * fall)
    return scores * LOG2_E, fall


@triton.jit
@no_type_check
def _reach(first, low, high, length, extents, tile, PACKED: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Which of `length` places a tile meets, if a member, from `first` on, meets those at ``[member + low, member + high]``.

    (begin, whole_begin, whole_end, end): in steps of STEP from begin; in between whole_begin and whole_end, all meet all.
    """
    begin = tl.maximum(first + low, 0)
    end = tl.minimum(first + SIZE + high, length)
    if PACKED:
        begin = tl.maximum(begin, tl.load(extents + 2 * tile))
        end = tl.minimum(end, tl.load(extents + 2 * tile + 1))
    begin = begin // STEP * STEP
    end = tl.maximum(end, begin)
    whole_begin, whole_end = begin, begin
    if not PACKED:
        aligned = (tl.maximum(first + SIZE - 1 + low, 0) + STEP - 1) // STEP * STEP
        whole_begin = tl.minimum(tl.maximum(aligned, begin), end)
        whole_end = tl.maximum(tl.minimum(first + high + 1, length) // STEP * STEP, whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
@no_type_check
def _seen(distance, inside, own, other, nearest, farthest, PACKED: tl.constexpr):
    seen = inside & (distance >= nearest) & (distance <= farthest)
    if PACKED:
        seen = seen & (own == other) & (own > 0)
    return seen


@triton.jit
@no_type_check
def extent_kernel(own, others, extents, own_length, length, SIZE: tl.constexpr, STEP: tl.constexpr):
    """From which place to which a tile's segments may occur among the others of its row; a tile a program.

    What lies between a tile's lowest and highest segment counts, so any order of segments is right, and packed ones are exact.
    """
    row, tile = tl.program_id(0), tl.program_id(1)
    place = tile * SIZE + tl.arange(0, SIZE)
    mine = tl.load(own + row.to(tl.int64) * own_length + place, mask=place < own_length, other=0)
    lowest, highest = tl.min(tl.where(mine > 0, mine, 2147483647), axis=0), tl.max(mine, axis=0)
    step = tl.arange(0, STEP)
    begin, end = tl.full((STEP,), 0, tl.int32) + length, tl.full((STEP,), 0, tl.int32)
    for start in range(0, length, STEP):
        there = start + step
        other = tl.load(others + row.to(tl.int64) * length + there, mask=there < length, other=0)
        hit = (other > 0) & (other >= lowest) & (other <= highest)
        begin = tl.where(hit, tl.minimum(begin, there), begin)
        end = tl.where(hit, there + 1, end)
    target = extents + 2 * (row * tl.num_programs(1) + tile)
    tl.store(target, tl.min(begin, axis=0))
    tl.store(target + 1, tl.max(end, axis=0))


@triton.jit
@no_type_check
def _forward_tiles(
    out, peak, total, query, slot, mine, k, v, kv_segments, begin, end, k_stride, v_stride, kv_length, nearest, farthest,
    scale, cap, CAPPED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, KEYS):
        place = start + tl.arange(0, KEYS)
        key = _rows(k, place, k_stride, kv_length, MASKED, HEAD_DIM, DIM)
        scores, _ = _soft_capped(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, CAPPED)
        if MASKED:
            other = tl.load(kv_segments + place, mask=place < kv_length, other=0)[None, :] if PACKED else 0
            distance = slot[:, None] - place[None, :]
            seen = _seen(distance, (place < kv_length)[None, :], mine, other, nearest, farthest, PACKED)
            scores = tl.where(seen, scores, HIDDEN)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weight = tl.exp2(scores - higher[:, None])
        if MASKED:
            weight = tl.where(seen, weight, 0.0)
        faded = tl.exp2(peak - higher)
        total = total * faded + tl.sum(weight, axis=1)
        value = _rows(v, place, v_stride, kv_length, MASKED, HEAD_DIM, DIM)
        out = tl.dot(weight.to(value.dtype), value, out * faded[:, None], input_precision="ieee")
        peak = higher
    return out, peak, total


@triton.jit
@no_type_check
def forward_kernel(
    q, k, v, out, lse, q_segments, kv_segments, extents, q_offset, q_stride, k_stride, v_stride, out_stride, heads, kv_heads,
    q_length, kv_length, nearest, farthest, scale, cap, CAPPED: tl.constexpr, PACKED: tl.constexpr, TRACED: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # The last tiles have the most keys to see: they go first.
    tile, row, head = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0) // heads, tl.program_id(0) % heads
    first_query, first_key, kv_head = row.to(tl.int64) * q_length, row.to(tl.int64) * kv_length, head // (heads // kv_heads)
    k += first_key * k_stride + kv_head * HEAD_DIM
    v += first_key * v_stride + kv_head * HEAD_DIM
    place = tile * QUERIES + tl.arange(0, QUERIES)
    query = _rows(q + first_query * q_stride + head * HEAD_DIM, place, q_stride, q_length, True, HEAD_DIM, DIM)
    shift = tl.load(q_offset).to(tl.int32) if TRACED else q_offset
    mine = tl.load(q_segments + first_query + place, mask=place < q_length, other=0)[:, None] if PACKED else 0
    begin, whole_begin, whole_end, end = _reach(
        tile * QUERIES + shift, -farthest, -nearest, kv_length, extents, row * tl.num_programs(1) + tile, PACKED, QUERIES, KEYS
    )
    kv_segments += first_key
    result = tl.zeros((QUERIES, DIM), tl.float32)
    peak, total = tl.full((QUERIES,), HIDDEN, tl.float32), tl.zeros((QUERIES,), tl.float32)
    slot = place + shift
    result, peak, total = _forward_tiles(
        result, peak, total, query, slot, mine, k, v, kv_segments, begin, whole_begin, k_stride, v_stride, kv_length, nearest,
        farthest, scale, cap, CAPPED, PACKED, True, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    result, peak, total = _forward_tiles(
        result, peak, total, query, slot, mine, k, v, kv_segments, whole_begin, whole_end, k_stride, v_stride, kv_length,
        nearest, farthest, scale, cap, CAPPED, PACKED, False, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    result, peak, total = _forward_tiles(
        result, peak, total, query, slot, mine, k, v, kv_segments, whole_end, end, k_stride, v_stride, kv_length, nearest,
        farthest, scale, cap, CAPPED, PACKED, True, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    # A query that sees nothing has zeros: its log-sum-exp is never used unmasked.
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    own = lse + (row.to(tl.int64) * heads + head) * q_length
    tl.store(own + place, tl.where(blind, 0.0, peak + tl.log2(total)), mask=place < q_length)
    own_out = out + first_query * out_stride + head * HEAD_DIM
    _write(own_out, place, out_stride, q_length, result / total[:, None], HEAD_DIM, DIM)


@triton.jit
@no_type_check
def _dq_tiles(
    dq, query, dout, log_sum, delta, slot, mine, k, v, kv_segments, begin, end, k_stride, v_stride, kv_length, nearest,
    farthest, scale, cap, CAPPED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, KEYS):
        place = start + tl.arange(0, KEYS)
        key = _rows(k, place, k_stride, kv_length, MASKED, HEAD_DIM, DIM)
        scores, fall = _soft_capped(tl.dot(query, tl.trans(key), input_precision="ieee"), scale, cap, CAPPED)
        weight = tl.exp2(scores - log_sum[:, None])
        if MASKED:
            other = tl.load(kv_segments + place, mask=place < kv_length, other=0)[None, :] if PACKED else 0
            distance = slot[:, None] - place[None, :]
            seen = _seen(distance, (place < kv_length)[None, :], mine, other, nearest, farthest, PACKED)
            weight = tl.where(seen, weight, 0.0)
        value = _rows(v, place, v_stride, kv_length, MASKED, HEAD_DIM, DIM)
        dscores = weight * (tl.dot(dout, tl.trans(value), input_precision="ieee") - delta[:, None])
        if CAPPED:
            dscores *= 4.0 * fall * (1.0 - fall)
        dq = tl.dot(dscores.to(key.dtype), key, dq, input_precision="ieee")
    return dq


@triton.jit
@no_type_check
def dq_kernel(
    q, k, v, out, dout, lse, delta, dq, q_segments, kv_segments, extents, q_offset, q_stride, k_stride, v_stride, out_stride,
    dout_stride, dq_stride, heads, kv_heads, q_length, kv_length, nearest, farthest, scale, cap, CAPPED: tl.constexpr,
    PACKED: tl.constexpr, TRACED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    tile, row, head = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0) // heads, tl.program_id(0) % heads
    first_query, first_key, kv_head = row.to(tl.int64) * q_length, row.to(tl.int64) * kv_length, head // (heads // kv_heads)
    k += first_key * k_stride + kv_head * HEAD_DIM
    v += first_key * v_stride + kv_head * HEAD_DIM
    place = tile * QUERIES + tl.arange(0, QUERIES)
    query = _rows(q + first_query * q_stride + head * HEAD_DIM, place, q_stride, q_length, True, HEAD_DIM, DIM)
    grads = _rows(dout + first_query * dout_stride + head * HEAD_DIM, place, dout_stride, q_length, True, HEAD_DIM, DIM)
    result = _rows(out + first_query * out_stride + head * HEAD_DIM, place, out_stride, q_length, True, HEAD_DIM, DIM)
    sums = tl.sum(grads.to(tl.float32) * result.to(tl.float32), axis=1)
    own = (row.to(tl.int64) * heads + head) * q_length + place
    tl.store(delta + own, sums, mask=place < q_length)
    log_sum = tl.load(lse + own, mask=place < q_length, other=0.0)
    shift = tl.load(q_offset).to(tl.int32) if TRACED else q_offset
    mine = tl.load(q_segments + first_query + place, mask=place < q_length, other=0)[:, None] if PACKED else 0
    begin, whole_begin, whole_end, end = _reach(
        tile * QUERIES + shift, -farthest, -nearest, kv_length, extents, row * tl.num_programs(1) + tile, PACKED, QUERIES, KEYS
    )
    kv_segments += first_key
    total = tl.zeros((QUERIES, DIM), tl.float32)
    slot = place + shift
    total = _dq_tiles(
        total, query, grads, log_sum, sums, slot, mine, k, v, kv_segments, begin, whole_begin, k_stride, v_stride, kv_length,
        nearest, farthest, scale, cap, CAPPED, PACKED, True, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    total = _dq_tiles(
        total, query, grads, log_sum, sums, slot, mine, k, v, kv_segments, whole_begin, whole_end, k_stride, v_stride,
        kv_length, nearest, farthest, scale, cap, CAPPED, PACKED, False, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    total = _dq_tiles(
        total, query, grads, log_sum, sums, slot, mine, k, v, kv_segments, whole_end, end, k_stride, v_stride, kv_length,
        nearest, farthest, scale, cap, CAPPED, PACKED, True, HEAD_DIM, DIM, KEYS,
    )  # fmt: skip
    _write(dq + first_query * dq_stride + head * HEAD_DIM, place, dq_stride, q_length, total * scale, HEAD_DIM, DIM)


@triton.jit
@no_type_check
def _dkv_tiles(
    dk, dv, key, value, place, mine, q, dout, lse, delta, q_segments, begin, end, shift, q_stride, dout_stride, q_length,
    nearest, farthest, scale, cap, CAPPED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, QUERIES):
        query_place = start + tl.arange(0, QUERIES)
        query = _rows(q, query_place, q_stride, q_length, MASKED, HEAD_DIM, DIM)
        log_sum = tl.load(lse + query_place, mask=query_place < q_length, other=0.0)
        # Transposed, [keys, queries]: what is multiplied next comes out of the registers as it is.
        scores, fall = _soft_capped(tl.dot(key, tl.trans(query), input_precision="ieee"), scale, cap, CAPPED)
        weight = tl.exp2(scores - log_sum[None, :])
        if MASKED:
            other = tl.load(q_segments + query_place, mask=query_place < q_length, other=0)[None, :] if PACKED else 0
            distance = (query_place + shift)[None, :] - place[:, None]
            seen = _seen(distance, (query_place < q_length)[None, :], mine, other, nearest, farthest, PACKED)
            weight = tl.where(seen, weight, 0.0)
        grads = _rows(dout, query_place, dout_stride, q_length, MASKED, HEAD_DIM, DIM)
        dv = tl.dot(weight.to(grads.dtype), grads, dv, input_precision="ieee")
        sums = tl.load(delta + query_place, mask=query_place < q_length, other=0.0)
        dscores = weight * (tl.dot(value, tl.trans(grads), input_precision="ieee") - sums[None, :])
        if CAPPED:
            dscores *= 4.0 * fall * (1.0 - fall)
        dk = tl.dot(dscores.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit
@no_type_check
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, q_segments, kv_segments, extents, q_offset, q_stride, k_stride, v_stride, dout_stride,
    dk_stride, dv_stride, heads, kv_heads, q_length, kv_length, nearest, farthest, scale, cap, CAPPED: tl.constexpr,
    PACKED: tl.constexpr, TRACED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    tile, row, kv_head = tl.program_id(1), tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    first_query, first_key, group = row.to(tl.int64) * q_length, row.to(tl.int64) * kv_length, heads // kv_heads
    place = tile * KEYS + tl.arange(0, KEYS)
    key = _rows(k + first_key * k_stride + kv_head * HEAD_DIM, place, k_stride, kv_length, True, HEAD_DIM, DIM)
    value = _rows(v + first_key * v_stride + kv_head * HEAD_DIM, place, v_stride, kv_length, True, HEAD_DIM, DIM)
    shift = tl.load(q_offset).to(tl.int32) if TRACED else q_offset
    mine = tl.load(kv_segments + first_key + place, mask=place < kv_length, other=0)[:, None] if PACKED else 0
    begin, whole_begin, whole_end, end = _reach(
        tile * KEYS - shift, nearest, farthest, q_length, extents, row * tl.num_programs(1) + tile, PACKED, KEYS, QUERIES
    )
    q_segments += first_query
    total_k, total_v = tl.zeros((KEYS, DIM), tl.float32), tl.zeros((KEYS, DIM), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        own_q, own_dout = q + first_query * q_stride + head * HEAD_DIM, dout + first_query * dout_stride + head * HEAD_DIM
        own = (row.to(tl.int64) * heads + head) * q_length
        total_k, total_v = _dkv_tiles(
            total_k, total_v, key, value, place, mine, own_q, own_dout, lse + own, delta + own, q_segments, begin, whole_begin,
            shift, q_stride, dout_stride, q_length, nearest, farthest, scale, cap, CAPPED, PACKED, True, HEAD_DIM, DIM, QUERIES,
        )  # fmt: skip
        total_k, total_v = _dkv_tiles(
            total_k, total_v, key, value, place, mine, own_q, own_dout, lse + own, delta + own, q_segments, whole_begin,
            whole_end, shift, q_stride, dout_stride, q_length, nearest, farthest, scale, cap, CAPPED, PACKED, False, HEAD_DIM,
            DIM, QUERIES,
        )  # fmt: skip
        total_k, total_v = _dkv_tiles(
            total_k, total_v, key, value, place, mine, own_q, own_dout, lse + own, delta + own, q_segments, whole_end, end,
            shift, q_stride, dout_stride, q_length, nearest, farthest, scale, cap, CAPPED, PACKED, True, HEAD_DIM, DIM, QUERIES,
        )  # fmt: skip
    _write(dk + first_key * dk_stride + kv_head * HEAD_DIM, place, dk_stride, kv_length, total_k * scale, HEAD_DIM, DIM)
    _write(dv + first_key * dv_stride + kv_head * HEAD_DIM, place, dv_stride, kv_length, total_v, HEAD_DIM, DIM)
