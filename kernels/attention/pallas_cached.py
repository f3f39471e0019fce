"""One token a row against KV caches, as Pallas kernels (lowered through Triton); see the contract.

`append` gives a program one key head of one row, with the query heads that read it: it turns them and writes k and v to their
place, in one kernel. `attend` gives a program the same heads and a part of the slots that the row sees, whatever the cache's
capacity is: it leaves a softmax over its part (largest score, sum, unnormalised output, float32), and XLA joins the parts.
Caches are written in place.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from jaxsloth.kernels.attention.contract import MAX_HEAD_DIM
from jaxsloth.kernels.attention.pallas_flash import HIDDEN, LOG2_E
from jaxsloth.kernels.attention.xla_cached import Tables
from jaxsloth.kernels.jax_platform import dot_float32

PROGRAMS = 512  # that fill a GPU
MOST_PARTS = 16
MOST_ELEMENTS = 2**31  # what an int32 offset reaches


def refuses(elements: int, head_dim: int) -> str | None:
    """Why the kernels can't take caches of so many elements each, or None."""
    if elements >= MOST_ELEMENTS:
        return f"offsets are int32, and a cache of {elements} elements has more than {MOST_ELEMENTS - 1}: use xla_cached"
    if head_dim > MAX_HEAD_DIM:
        return f"tiles hold whole heads in registers, and head_dim={head_dim} is over {MAX_HEAD_DIM}: use xla_cached"
    return None


def _check(q: Array, keys: Array) -> None:
    kv_heads, head_dim = keys.shape[2:]
    reason = refuses(keys.size, head_dim)
    if reason is not None:
        raise ValueError(reason)
    if q.shape[1] % (kv_heads * head_dim):
        raise ValueError(f"heads ({q.shape[1] / head_dim:g}) must be a multiple of kv_heads ({kv_heads})")


def _heads(q: Any, kv_heads: int, kv_head: Any, least: int) -> tuple[Any, Any, Any]:
    """(heads of q ``[rows, heads, head_dim]`` that read kv_head, channels, which of the two are there), padded to powers of
    two, of heads at least `least`."""
    group, head_dim = q.shape[1] // kv_heads, q.shape[2]
    member = jnp.arange(max(pl.next_power_of_2(group), least), dtype=jnp.int32)
    channel = jnp.arange(max(pl.next_power_of_2(head_dim), 16), dtype=jnp.int32)
    return kv_head * group + member, channel, (member < group)[:, None] & (channel < head_dim)[None, :]


def _turn(ref: Any, row: Any, head: Any, channel: Any, there: Any, tables: Any) -> Any:
    """Some heads of a row, turned; every product and sum is rounded to their dtype, as plain torch rounds."""
    value = plgpu.load(ref.at[row, head[:, None], channel[None, :]], mask=there, other=0.0)
    if not tables:
        return value
    half, dtype = tables[0].shape[1], ref.dtype
    first, turned = channel < half, channel < 2 * half  # channel i turns with i + half; what lies behind the two stays
    partner = jnp.where(first, channel + half, channel - half)
    other = plgpu.load(ref.at[row, head[:, None], partner[None, :]], mask=there & turned[None, :], other=0.0)
    place = jnp.where(first, channel, channel - half)
    c, s = (plgpu.load(table.at[row, place], mask=turned, other=0.0).astype(dtype) for table in tables)

    def times(a: Any, b: Any) -> Any:
        return (a.astype(jnp.float32) * b.astype(jnp.float32)[None, :]).astype(dtype).astype(jnp.float32)

    other = times(other, s)
    total = times(value, c) + jnp.where(first[None, :], -other, other)
    return jnp.where(turned[None, :], total.astype(dtype), value)


def _append_kernel(slot: Any, q: Any, k: Any, v: Any, *rest: Any) -> None:
    # The caches come twice: as they were, which nobody reads, and as what is written.
    *tables, _, _, q_out, keys, values = rest
    row, kv_head = pl.program_id(0), pl.program_id(1)
    head, channel, there = _heads(q, keys.shape[2], kv_head, 1)
    plgpu.store(q_out.at[row, head[:, None], channel[None, :]], _turn(q, row, head, channel, there, tables), mask=there)
    own, inside = kv_head + jnp.zeros(1, jnp.int32), (channel < k.shape[2])[None, :]
    place = jnp.minimum(slot[0], keys.shape[1] - 1)
    for cache, value in (
        (keys, _turn(k, row, own, channel, inside, tables)),
        (values, _turn(v, row, own, channel, inside, ())),
    ):
        target = cache.at[row, place, own[:, None], channel[None, :]]
        plgpu.store(target, value.astype(cache.dtype), mask=inside)


def append(
    q: Float[Array, "rows all_heads"],
    k: Float[Array, "rows own_heads"],
    v: Float[Array, "rows own_heads"],
    tables: Tables | None,
    keys: Float[Array, "rows capacity kv_heads head_dim"],
    values: Float[Array, "rows capacity kv_heads head_dim"],
    slot: Int32[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """As xla_cached's function of this name, on CUDA, for caches under 2**31 elements each.

    Raises:
        ValueError: as there; heads is no multiple of kv_heads; the caches are what `refuses` refuses.
    """
    _check(q, keys)
    rows, kv_heads, head_dim = q.shape[0], *keys.shape[2:]
    if rows == 0:
        return q, keys, values
    sides = () if tables is None else tuple(table.reshape(rows, table.shape[-1]) for table in tables)
    if sides and 2 * sides[0].shape[1] > head_dim:
        raise ValueError(f"the tables turn {2 * sides[0].shape[1]} channels, and a head has {head_dim}")
    new = (t.reshape(rows, t.shape[1] // head_dim, head_dim) for t in (q, k, v))
    arguments = (jnp.reshape(slot, 1).astype(jnp.int32), *new, *sides, keys, values)
    outs = tuple(jax.ShapeDtypeStruct(t.shape, t.dtype) for t in (arguments[1], keys, values))
    call = pl.pallas_call(
        _append_kernel,
        out_shape=outs,
        grid=(rows, kv_heads),
        input_output_aliases={len(arguments) - 2: 1, len(arguments) - 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="cache_append",
    )
    turned, keys, values = call(*arguments)
    return turned.reshape(q.shape), keys, values


def _attend_kernel(
    slot: Any,
    first: Any,
    q: Any,
    keys: Any,
    values: Any,
    out: Any,
    *sides: Any,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    tile: int,
) -> None:
    _, capacity, kv_heads, head_dim = keys.shape
    row, kv_head = jax.lax.div(pl.program_id(0), kv_heads), jax.lax.rem(pl.program_id(0), kv_heads)
    part, parts = pl.program_id(1), pl.num_programs(1)
    head, channel, there = _heads(q, kv_heads, kv_head, 16)
    query = plgpu.load(q.at[row, head[:, None], channel[None, :]], mask=there, other=0.0)
    end = jnp.minimum(slot[0], capacity - 1) + 1
    begin = jnp.maximum(first[row], 0 if window is None else jnp.maximum(end - window, 0))
    # What is seen is dealt out, not the capacity: a long cache with little in it fills the GPU too.
    tiles = jax.lax.div(jnp.maximum(end - begin, 0) + tile - 1, tile)
    share = jax.lax.div(tiles + parts - 1, parts)

    def read(cache: Any, place: Any, seen: Any) -> Any:
        source = cache.at[row, place[:, None], kv_head, channel[None, :]]
        return plgpu.load(source, mask=seen[:, None] & (channel < head_dim)[None, :], other=0.0)

    def add(index: Any, carry: Any) -> Any:
        result, peak, total = carry
        place = begin + index * tile + jnp.arange(tile, dtype=jnp.int32)
        seen = place < end
        key, value = read(keys, place, seen), read(values, place, seen)
        scores = dot_float32(query, key, (1, 1)) * scale
        if soft_cap is not None:  # from exponentials it would be off by 2**-24, soft_cap times over
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(seen[None, :], scores * LOG2_E, HIDDEN)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        weight = jnp.exp2(scores - higher[:, None])  # a tile has a slot that is seen: hidden ones weigh nothing
        faded = jnp.exp2(peak - higher)
        result = result * faded[:, None] + dot_float32(weight.astype(value.dtype), value, (1, 0))
        return result, higher, total * faded + jnp.sum(weight, axis=1)

    zeros = jnp.zeros(query.shape, jnp.float32), jnp.full(head.shape, HIDDEN, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    result, peak, total = jax.lax.fori_loop(part * share, jnp.minimum((part + 1) * share, tiles), add, zeros)
    if sides:
        inside = head < (kv_head + 1) * (q.shape[1] // kv_heads)
        for side, value in zip(sides, (peak, total), strict=True):
            plgpu.store(side.at[part, row, head], value, mask=inside)
    else:
        result = result / jnp.where(total == 0.0, 1.0, total)[:, None]  # who sees nothing has zeros
    plgpu.store(out.at[part, row, head[:, None], channel[None, :]], result.astype(out.dtype), mask=there)


def _join(outs: Array, peaks: Array, sums: Array) -> Array:
    """The softmax over all parts. Written out over the parts, so that XLA has no reductions here and makes one kernel of it."""
    peak = reduce(jnp.maximum, peaks)
    weights = [jnp.exp2(own - peak) for own in peaks]
    total = sum(weight * own for weight, own in zip(weights, sums, strict=True))
    result = sum(weight[..., None] * own for weight, own in zip(weights, outs, strict=True))
    return result / jnp.where(total == 0.0, 1.0, total)[..., None]


def attend(
    q: Float[Array, "rows all_heads"],
    keys: Float[Array, "rows capacity kv_heads head_dim"],
    values: Float[Array, "rows capacity kv_heads head_dim"],
    first: Int32[Array, " rows"],
    slot: Int32[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "rows all_heads"]:
    """As xla_cached's function of this name, on CUDA, for caches under 2**31 elements each.

    Raises:
        ValueError: heads is no multiple of kv_heads, or the caches are what `refuses` refuses.
    """
    _check(q, keys)
    rows, capacity, kv_heads, head_dim = keys.shape
    if q.size == 0:
        return q
    # float32 takes true products, outside the tensor cores.
    tile, stages = (16, 1) if q.dtype == jnp.float32 else (64, 2)
    parts = min(pl.cdiv(PROGRAMS, rows * kv_heads), pl.cdiv(capacity, 64), MOST_PARTS)
    queries = q.reshape(rows, q.shape[1] // head_dim, head_dim)
    outs = (jax.ShapeDtypeStruct((1, *queries.shape), q.dtype),)
    if parts > 1:
        side = jax.ShapeDtypeStruct((parts, *queries.shape[:2]), jnp.float32)
        outs = jax.ShapeDtypeStruct((parts, *queries.shape), jnp.float32), side, side
    call = pl.pallas_call(
        partial(_attend_kernel, scale=scale, window=window, soft_cap=soft_cap, tile=tile),
        out_shape=outs,
        grid=(rows * kv_heads, parts),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=stages),
        interpret=interpret,
        name="cache_attend",
    )
    found = call(jnp.reshape(slot, 1).astype(jnp.int32), first, queries, keys, values)
    out = _join(*found) if parts > 1 else found[0]
    return out.astype(q.dtype).reshape(q.shape)
