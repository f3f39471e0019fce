"""FlashAttention-2 (Dao 2023, arXiv:2307.08691) in Pallas (lowered through Triton): scores with a soft cap, windows, grouped
heads and packed documents, for training.

The mathematics and the rule of who sees whom are flash_kernels.py's: query i sees key j where ``nearest <= slot(i) - j <=
farthest`` and their segments agree; scores in base 2; δ is left by the kernel of dq to that of dk and dv.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxsloth.kernels.attention.xla_ops import check_arguments
from jaxsloth.kernels.jax_platform import precision_of

UNBOUNDED = 2**30
LOG2_E = 1.4426950408889634
HIDDEN = -1e30  # finite, so that a row that sees nothing has no NaN in it


@dataclass(frozen=True)
class Tiles:
    """Queries and keys handled at once, and how the program is laid out."""

    queries: int
    keys: int
    warps: int
    stages: int


# (forward, dq, dk and dv) by the power of two that holds a head; `benchmarks.tiles` measures others.
HALF = {
    64: (Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 3)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 3)),
    256: (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2)),
}
SINGLE = (Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1))  # float32: true products, outside the tensor cores


def tiles_for(head_dim: int, dtype: Any) -> tuple[Tiles, Tiles, Tiles]:
    return SINGLE if jnp.dtype(dtype) == jnp.float32 else HALF[max(pl.next_power_of_2(head_dim), 64)]


@dataclass(frozen=True)
class Shape:
    """What the kernels are made for. Arrays of heads come to them as ``[batch·length, heads·head_dim]``."""

    batch: int
    heads: int
    kv_heads: int
    q_length: int
    kv_length: int
    head_dim: int
    scale: float
    nearest: int
    farthest: int
    soft_cap: float | None
    packed: bool
    interpret: bool

    @property
    def width(self) -> int:
        return max(pl.next_power_of_2(self.head_dim), 16)


def _place(shape: Shape, row: Any, place: Any, length: int, head: Any) -> tuple[tuple[Any, Any], Any]:
    """(index into an array of heads, mask): one head's channels at some places of a row, those from `length` on left out."""
    channel = jnp.arange(shape.width, dtype=jnp.int32)
    index = (row * length + place)[:, None], (head * shape.head_dim + channel)[None, :]
    return index, (place < length)[:, None] & (channel < shape.head_dim)[None, :]


def _rows(ref: Any, shape: Shape, row: Any, place: Any, length: int, head: Any, checked: bool = True) -> Any:
    """Zero where `_place` leaves out; not checked: no place is from `length` on."""
    (index, column), mask = _place(shape, row, place, length, head)
    if not checked and shape.width == shape.head_dim:
        return plgpu.load(ref.at[index, column])
    # The interpreter reads what the mask hides too.
    index, column = jnp.minimum(index, ref.shape[0] - 1), jnp.minimum(column, ref.shape[1] - 1)
    return plgpu.load(ref.at[index, column], mask=mask, other=0.0)


def _write(ref: Any, shape: Shape, row: Any, place: Any, length: int, head: Any, value: Any) -> None:
    index, mask = _place(shape, row, place, length, head)
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _line(ref: Any, row: Any, place: Any, length: int) -> Any:
    """One row's numbers at some places, zero from `length` on."""
    return plgpu.load(ref.at[row, jnp.where(place < length, place, 0)], mask=place < length, other=jnp.zeros((), ref.dtype))


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _soft_capped(shape: Shape, scores: Any) -> tuple[Any, Any]:
    """(The scores in base 2, behind scale and cap; the cap's derivative)."""
    scores = scores * shape.scale
    if shape.soft_cap is None:
        return scores * LOG2_E, 1.0
    fall = 1.0 / (1.0 + jnp.exp2(scores * (2.0 * LOG2_E / shape.soft_cap)))  # tanh(x) = 1 - 2 / (1 + exp(2x))
    return shape.soft_cap * LOG2_E * (1.0 - 2.0 * fall), 4.0 * fall * (1.0 - fall)


def _seen(shape: Shape, distance: Any, inside: Any, own: Any, other: Any) -> Any:
    seen = inside & (distance >= shape.nearest) & (distance <= shape.farthest)
    return seen & (own == other) & (own > 0) if shape.packed else seen


def _walk(
    first: Any, size: int, step: int, low: int, high: int, length: int, extent: Any, body: Callable[..., Any], carry: Any
) -> Any:
    """Goes over those of `length` places that a tile of `size` meets whose members meet ``[member + low, member + high]``.

    body(start, carry, masked) takes `step` places; between two ends all meet all and nothing need be masked. extent: (from
    where, to where) segments allow, or None.
    """
    begin, end = jnp.maximum(first + low, 0), jnp.minimum(first + size + high, length)
    if extent is not None:
        begin, end = jnp.maximum(begin, extent[0]), jnp.minimum(end, extent[1])
    begin = jax.lax.div(begin, step) * step
    end = jnp.maximum(end, begin)
    parts = [(begin, end, True)]
    if extent is None:
        aligned = jax.lax.div(jnp.maximum(first + size - 1 + low, 0) + step - 1, step) * step
        whole_begin = jnp.minimum(jnp.maximum(aligned, begin), end)
        whole = jax.lax.div(jnp.maximum(jnp.minimum(first + high + 1, length), 0), step) * step
        whole_end = jnp.maximum(whole, whole_begin)
        parts = [(begin, whole_begin, True), (whole_begin, whole_end, False), (whole_end, end, True)]
    for start, stop, masked in parts:

        def some(index: Any, carry: Any, start: Any = start, masked: bool = masked) -> Any:
            return body(start + index * step, carry, masked)

        carry = jax.lax.fori_loop(0, jax.lax.div(jnp.maximum(stop - start, 0) + step - 1, step), some, carry)
    return carry


def _segments_of(shape: Shape, refs: Any, tile: Any, row: Any) -> tuple[Any, Any, Any]:
    """(the queries' segments, the keys', the tile's extent) of the references that a packed kernel has."""
    if not shape.packed:
        return None, None, None
    q_segments, kv_segments, extents = refs
    return q_segments, kv_segments, (extents[row, tile, 0], extents[row, tile, 1])


def _forward_kernel(offset: Any, q: Any, k: Any, v: Any, *rest: Any, shape: Shape, tiles: Tiles) -> None:
    # The last tiles have the most keys to see: they go first.
    tile = pl.num_programs(1) - 1 - pl.program_id(1)
    row, head = jax.lax.div(pl.program_id(0), shape.heads), jax.lax.rem(pl.program_id(0), shape.heads)
    kv_head = jax.lax.div(head, shape.heads // shape.kv_heads)
    *refs, out, lse = rest
    q_segments, kv_segments, extent = _segments_of(shape, refs, tile, row)
    place = tile * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
    query, slot = _rows(q, shape, row, place, shape.q_length, head), place + offset[0]
    mine = _line(q_segments, row, place, shape.q_length) if shape.packed else None

    def add(start: Any, carry: Any, masked: bool) -> Any:
        result, peak, total = carry
        there = start + jnp.arange(tiles.keys, dtype=jnp.int32)
        scores, _ = _soft_capped(shape, _dot(query, _rows(k, shape, row, there, shape.kv_length, kv_head, masked), (1, 1)))
        seen = None
        if masked:
            other = _line(kv_segments, row, there, shape.kv_length)[None, :] if shape.packed else None
            own = None if mine is None else mine[:, None]
            seen = _seen(shape, slot[:, None] - there[None, :], (there < shape.kv_length)[None, :], own, other)
            scores = jnp.where(seen, scores, HIDDEN)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        weight = jnp.exp2(scores - higher[:, None])
        if seen is not None:
            weight = jnp.where(seen, weight, 0.0)
        faded = jnp.exp2(peak - higher)
        value = _rows(v, shape, row, there, shape.kv_length, kv_head, masked)
        result = result * faded[:, None] + _dot(weight.astype(value.dtype), value, (1, 0))
        return result, higher, total * faded + jnp.sum(weight, axis=1)

    start = jnp.zeros((tiles.queries, shape.width), jnp.float32)
    start = start, jnp.full(tiles.queries, HIDDEN, jnp.float32), jnp.zeros(tiles.queries, jnp.float32)
    first, low, high = tile * tiles.queries + offset[0], -shape.farthest, -shape.nearest
    result, peak, total = _walk(first, tiles.queries, tiles.keys, low, high, shape.kv_length, extent, add, start)
    # A query that sees nothing has zeros: its log-sum-exp is never used unmasked.
    blind = total == 0.0
    total = jnp.where(blind, 1.0, total)
    inside = place < shape.q_length
    log_sum = jnp.where(blind, 0.0, peak + jnp.log(total) * LOG2_E)
    plgpu.store(lse.at[row * shape.heads + head, place], log_sum, mask=inside)
    _write(out, shape, row, place, shape.q_length, head, result / total[:, None])


def _dq_kernel(
    offset: Any, q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, *rest: Any, shape: Shape, tiles: Tiles
) -> None:
    tile = pl.num_programs(1) - 1 - pl.program_id(1)
    row, head = jax.lax.div(pl.program_id(0), shape.heads), jax.lax.rem(pl.program_id(0), shape.heads)
    kv_head = jax.lax.div(head, shape.heads // shape.kv_heads)
    *refs, delta, dq = rest
    q_segments, kv_segments, extent = _segments_of(shape, refs, tile, row)
    place = tile * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
    query, grads, result = (_rows(ref, shape, row, place, shape.q_length, head) for ref in (q, dout, out))
    sums = jnp.sum(grads.astype(jnp.float32) * result.astype(jnp.float32), axis=1)
    own_line, inside = row * shape.heads + head, place < shape.q_length
    plgpu.store(delta.at[own_line, place], sums, mask=inside)
    log_sum, slot = _line(lse, own_line, place, shape.q_length), place + offset[0]
    mine = _line(q_segments, row, place, shape.q_length) if shape.packed else None

    def add(start: Any, total: Any, masked: bool) -> Any:
        there = start + jnp.arange(tiles.keys, dtype=jnp.int32)
        key = _rows(k, shape, row, there, shape.kv_length, kv_head, masked)
        scores, dtanh = _soft_capped(shape, _dot(query, key, (1, 1)))
        weight = jnp.exp2(scores - log_sum[:, None])
        if masked:
            other = _line(kv_segments, row, there, shape.kv_length)[None, :] if shape.packed else None
            own = None if mine is None else mine[:, None]
            seen = _seen(shape, slot[:, None] - there[None, :], (there < shape.kv_length)[None, :], own, other)
            weight = jnp.where(seen, weight, 0.0)
        value = _rows(v, shape, row, there, shape.kv_length, kv_head, masked)
        dscores = weight * (_dot(grads, value, (1, 1)) - sums[:, None]) * dtanh
        return total + _dot(dscores.astype(key.dtype), key, (1, 0))

    start = jnp.zeros((tiles.queries, shape.width), jnp.float32)
    first, low, high = tile * tiles.queries + offset[0], -shape.farthest, -shape.nearest
    total = _walk(first, tiles.queries, tiles.keys, low, high, shape.kv_length, extent, add, start)
    _write(dq, shape, row, place, shape.q_length, head, total * shape.scale)


def _dkv_kernel(
    offset: Any, q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any, *rest: Any, shape: Shape, tiles: Tiles
) -> None:
    tile, row, kv_head = (
        pl.program_id(1),
        jax.lax.div(pl.program_id(0), shape.kv_heads),
        jax.lax.rem(pl.program_id(0), shape.kv_heads),
    )
    *refs, dk, dv = rest
    q_segments, kv_segments, extent = _segments_of(shape, refs, tile, row)
    place = tile * tiles.keys + jnp.arange(tiles.keys, dtype=jnp.int32)
    key, value = (_rows(ref, shape, row, place, shape.kv_length, kv_head) for ref in (k, v))
    mine = _line(kv_segments, row, place, shape.kv_length) if shape.packed else None
    group = shape.heads // shape.kv_heads

    def one_head(member: Any, totals: Any) -> Any:
        head = kv_head * group + member

        def add(start: Any, carry: Any, masked: bool) -> Any:
            there = start + jnp.arange(tiles.queries, dtype=jnp.int32)
            query = _rows(q, shape, row, there, shape.q_length, head, masked)
            # Transposed, [keys, queries]: what is multiplied next comes out of the registers as it is.
            scores, dtanh = _soft_capped(shape, _dot(key, query, (1, 1)))
            weight = jnp.exp2(scores - _line(lse, row * shape.heads + head, there, shape.q_length)[None, :])
            if masked:
                other = _line(q_segments, row, there, shape.q_length)[None, :] if shape.packed else None
                own = None if mine is None else mine[:, None]
                distance = (there + offset[0])[None, :] - place[:, None]
                seen = _seen(shape, distance, (there < shape.q_length)[None, :], own, other)
                weight = jnp.where(seen, weight, 0.0)
            grads = _rows(dout, shape, row, there, shape.q_length, head, masked)
            sums = _line(delta, row * shape.heads + head, there, shape.q_length)
            dscores = weight * (_dot(value, grads, (1, 1)) - sums[None, :]) * dtanh
            total_k, total_v = carry
            total_v = total_v + _dot(weight.astype(grads.dtype), grads, (1, 0))
            return total_k + _dot(dscores.astype(query.dtype), query, (1, 0)), total_v

        first = tile * tiles.keys - offset[0]
        low, high = shape.nearest, shape.farthest
        return _walk(first, tiles.keys, tiles.queries, low, high, shape.q_length, extent, add, totals)

    zeros = jnp.zeros((tiles.keys, shape.width), jnp.float32)
    total_k, total_v = jax.lax.fori_loop(0, group, one_head, (zeros, zeros))
    _write(dk, shape, row, place, shape.kv_length, kv_head, total_k * shape.scale)
    _write(dv, shape, row, place, shape.kv_length, kv_head, total_v)


def _extents(own: Array, others: Array, size: int) -> Array:
    """int32 ``[batch, tiles, 2]``: from where to where the others may have the segments of a tile of `size`."""
    tiles = jnp.pad(own, ((0, 0), (0, -own.shape[1] % size))).reshape(own.shape[0], -1, size)
    lowest = jnp.where(tiles > 0, tiles, 2**31 - 1).min(axis=2)[:, :, None]
    hit = (others[:, None, :] >= lowest) & (others[:, None, :] <= tiles.max(axis=2)[:, :, None]) & (others[:, None, :] > 0)
    place = jnp.arange(others.shape[1], dtype=jnp.int32)
    begin = jnp.where(hit, place, others.shape[1]).min(axis=2)
    return jnp.stack([begin, jnp.where(hit, place + 1, 0).max(axis=2)], axis=2).astype(jnp.int32)


def _call(kernel: Any, shape: Shape, tiles: Tiles, grid: tuple[int, int], outs: Any, name: str, *arrays: Any) -> Any:
    call = pl.pallas_call(
        partial(kernel, shape=shape, tiles=tiles),
        out_shape=outs,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=shape.interpret,
        name=name,
    )
    return call(*arrays)


def _like(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(shape: Shape, q: Any, k: Any, v: Any, segments: Any, offset: Any) -> Any:
    return _forward(shape, q, k, v, segments, offset)[0]


def _forward(shape: Shape, q: Any, k: Any, v: Any, segments: Any, offset: Any) -> tuple[Any, Any]:
    tiles = tiles_for(shape.head_dim, q.dtype)[0]
    sides = () if segments is None else (*segments, _extents(*segments, tiles.queries))
    outs = _like(q), jax.ShapeDtypeStruct((shape.batch * shape.heads, shape.q_length), jnp.float32)
    grid = shape.batch * shape.heads, pl.cdiv(shape.q_length, tiles.queries)
    out, lse = _call(_forward_kernel, shape, tiles, grid, outs, "flash_forward", offset, q, k, v, *sides)
    return out, (q, k, v, segments, offset, out, lse)


def _backward(shape: Shape, kept: Any, dout: Any) -> tuple[Any, ...]:
    q, k, v, segments, offset, out, lse = kept
    _, for_dq, for_dkv = tiles_for(shape.head_dim, q.dtype)
    sides = () if segments is None else (*segments, _extents(*segments, for_dq.queries))
    grid = shape.batch * shape.heads, pl.cdiv(shape.q_length, for_dq.queries)
    given = offset, q, k, v, out, dout, lse, *sides
    delta, dq = _call(_dq_kernel, shape, for_dq, grid, (_like(lse), _like(q)), "flash_dq", *given)
    sides = () if segments is None else (*segments, _extents(*segments[::-1], for_dkv.keys))
    grid = shape.batch * shape.kv_heads, pl.cdiv(shape.kv_length, for_dkv.keys)
    given = offset, q, k, v, dout, lse, delta, *sides
    dk, dv = _call(_dkv_kernel, shape, for_dkv, grid, (_like(k), _like(v)), "flash_dkv", *given)
    return dq, dk, dv, None, None


_flash.defvjp(_forward, _backward)


def attention(
    q: Float[Array, "batch q_length heads head_dim"],
    k: Float[Array, "batch kv_length kv_heads head_dim"],
    v: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    q_segments: Int[Array, "batch q_length"] | None = None,
    kv_segments: Int[Array, "batch kv_length"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
    interpret: bool = False,
) -> Float[Array, "batch q_length heads head_dim"]:
    """As xla_ops' function of this name, on CUDA; keeps q, k, v, the output and a log-sum-exp a row.

    Raises:
        ValueError: as xla_ops' function.
    """
    check_arguments(q, k, q_segments, kv_segments)
    if q.size == 0:
        return q
    segments = None
    if q_segments is not None:
        segments = q_segments, q_segments if kv_segments is None else kv_segments
    farthest = UNBOUNDED if window is None else window - 1
    sizes = q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1], q.shape[3]
    shape = Shape(*sizes, scale, 0 if causal else -farthest, farthest, soft_cap, segments is not None, interpret)
    flat = (t.reshape(t.shape[0] * t.shape[1], -1) for t in (q, k, v))
    return _flash(shape, *flat, segments, jnp.asarray(q_offset, jnp.int32).reshape(1)).reshape(q.shape)
