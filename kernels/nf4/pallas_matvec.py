"""NF4 weights times few rows as one Pallas kernel (lowered through Triton): codes are decoded in registers and met by x.

A program owns `Tiles.out` rows of a weight and goes through them some blocks of 64 values at a time; codes are looked up by
shuffles between the lanes of a warp (ptx.py), four at a time as they came from memory. The two nibbles of a byte meet the even
and the odd values of x, which are handed over apart, so that nothing is interleaved and every load is of neighbours. One row
of x is multiplied in float32 lanes; more go through the tensor cores, each weight rounded to x's dtype first, and `in` is
split over programs, whose float32 sums are added afterwards, so that there are enough of them and none is long. Stacked
weights are read in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxsloth.kernels.jax_platform import dot_float32
from jaxsloth.kernels.nf4.contract import BLOCK, MATVEC_ROWS, NESTED_BLOCK, NF4
from jaxsloth.kernels.nf4.pallas_kernel import _arguments
from jaxsloth.kernels.nf4.ptx import HIGH, LOW

_BYTES = BLOCK // 2
LOOKUP = {"constraints": "=f,=f,=f,=f,r", "pack": 4}
WARPS = 15 * 132  # that an H200 is busy with at one row of x; any other GPU runs them too
PROGRAMS = 768  # the same, for several rows
STEPS = 16  # of one of these programs


class Tiles(NamedTuple):
    """How a product is cut: rows of the weight and blocks of them a program handles at once, parts of `in`, warps a program."""

    out: int
    blocks: int
    split: int
    warps: int


class Part(NamedTuple):
    """One of the weights: its rows, outer blocks a layer, and where its tiles and its columns of the result begin."""

    out: int
    outer_blocks: int
    tile: int
    column: int


def tiles_for(rows: int, blocks: int, outs: Sequence[int]) -> Tiles:
    """The fastest of those tried on an H200 with an 8B model's layers (docs/performance.md).

    blocks: in a row of the weights.
    """
    if rows == 1:  # a program is one warp, which waits for no other
        out, most, warps = (4, 8, 1) if sum(pl.cdiv(one, 4) for one in outs) >= WARPS else (2, 32 if blocks >= 128 else 16, 1)
    else:
        out, most, warps = (64, 2, 4) if sum(pl.cdiv(one, 64) for one in outs) >= PROGRAMS // 2 else (32, 4, 2)
    across = next(size for size in (32, 16, 8, 4, 2, 1) if size <= most and blocks % size == 0)
    programs, split = sum(pl.cdiv(one, out) for one in outs), 1
    if rows > 1:  # a program waits for its tensor cores: short ones, and enough of them
        while (
            (blocks // across // split > STEPS or programs * split < PROGRAMS)
            and split < 8
            and blocks % (2 * split * across) == 0
        ):
            split *= 2
    return Tiles(out, across, split, warps)


def _values(table: Any, codes: Any, interpret: bool) -> tuple[Any, Any]:
    """float32 of the high and of the low nibbles of uint8 codes; Pallas' interpreter runs no PTX."""
    if interpret:
        wide = codes.astype(jnp.int32)
        return table[wide >> 4], table[wide & 15]
    kind = [jax.ShapeDtypeStruct(codes.shape, jnp.float32)]
    (high,), (low,) = (
        plgpu.elementwise_inline_asm(ptx, args=[codes], result_shape_dtypes=kind, **LOOKUP) for ptx in (HIGH, LOW)
    )
    return high, low


def _kernel(table: Any, *rest: Any, parts: tuple[Part, ...], tiles: Tiles, across: int, rows: int, interpret: bool) -> None:
    """across: blocks in a row of the weights. x ``[2, rows, in / 2]``, y ``[split, rows, sum of out]``."""
    *levels, x, y = rest
    each = len(levels) // len(parts)
    tile, split = pl.program_id(0), pl.program_id(1)  # the interpreter knows them outside of branches only
    if len(parts) == 1:
        _product(table, levels, x, y, parts[0], tile, split, tiles, across, rows, interpret)
        return
    for place, part in enumerate(parts):
        own = levels[place * each : (place + 1) * each]
        end = parts[place + 1].tile if place + 1 < len(parts) else 1 << 30

        @pl.when((tile >= part.tile) & (tile < end))
        def _(own: Any = own, part: Part = part) -> None:
            _product(table, own, x, y, part, tile - part.tile, split, tiles, across, rows, interpret)


def _product(
    table: Any,
    levels: Sequence[Any],
    x: Any,
    y: Any,
    part: Part,
    tile: Any,
    split: Any,
    tiles: Tiles,
    across: int,
    rows: int,
    interpret: bool,
) -> None:
    """One program's rows of one weight, over its part of `in`. A tile is ``[rows of the weight, blocks, bytes of a block]``, so
    that a block's scale meets its values where they are."""
    layer, codes, absmax, *second = levels
    row = jnp.arange(tiles.out, dtype=jnp.int32) + tile * tiles.out
    inside, steps = row < part.out, across // tiles.split // tiles.blocks
    start = split * (steps * tiles.blocks)
    own = jnp.where(inside, row, 0)
    stacked_row, byte = own + layer[0] * part.out, jnp.arange(_BYTES, dtype=jnp.int32)
    shift = second[1][layer[0]] if second else None

    def blocks_of(step: Any) -> Any:
        return start + step * tiles.blocks + jnp.arange(tiles.blocks, dtype=jnp.int32)

    def fetch(step: Any) -> Any:
        return codes[stacked_row[:, None, None], blocks_of(step)[None, :, None] * _BYTES + byte[None, None, :]]

    def scales(step: Any) -> Any:
        block = blocks_of(step)[None, :]
        scale = absmax[stacked_row[:, None] * across + block]
        if shift is None:
            return scale
        level = (own[:, None] * across + block) // NESTED_BLOCK + layer[0] * part.outer_blocks
        return second[2][scale.astype(jnp.int32)] * second[0][level] + shift

    def add(step: Any, total: Any) -> Any:
        # Not fetched a step ahead: codes that a loop carries are taken apart into bytes and put together again.
        high, low = _values(table, fetch(step), interpret)
        if rows == 1:
            # Every row of the tile reads x for itself: rows that share it would exchange it through shared memory.
            channel = jnp.broadcast_to(blocks_of(step)[None, :, None] * _BYTES + byte[None, None, :], high.shape)
            even, odd = (x[half, 0, channel].astype(jnp.float32) for half in (0, 1))
            return total + (jnp.sum(high * even, axis=2) + jnp.sum(low * odd, axis=2)) * scales(step)
        scale, which = scales(step)[:, :, None], jnp.arange(rows, dtype=jnp.int32)[:, None]
        flat = (start + step * tiles.blocks) * _BYTES + jnp.arange(tiles.blocks * _BYTES, dtype=jnp.int32)[None, :]
        for half, values in enumerate((high, low)):
            weight = (values * scale).astype(x.dtype).reshape(tiles.out, tiles.blocks * _BYTES)
            total += dot_float32(weight, x[half, which, flat], (1, 1))
        return total

    shape = (tiles.out, tiles.blocks if rows == 1 else rows)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros(shape, jnp.float32))
    if rows == 1:
        total = jnp.sum(total, axis=1)[:, None]
    which, shape = jnp.arange(rows, dtype=jnp.int32)[None, :], (tiles.out, rows)
    target = (jnp.broadcast_to(index, shape) for index in (split, which, (part.column + row)[:, None]))
    plgpu.store(y.at[*target], total.astype(y.dtype), mask=jnp.broadcast_to(inside[:, None], shape))


@partial(jax.jit, static_argnames=("tiles", "interpret"))
def matvec(
    x: Float[Array, "rows in"],
    weights: Sequence[NF4],
    *,
    layer: Int[Array, ""] | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """As xla_ops' function of this name, for at most `MATVEC_ROWS` rows of whole blocks.

    tiles: by default those of `tiles_for`.

    Raises:
        ValueError: more rows, rows that are not whole blocks, weights of different widths or some of them nested, or tiles that
            do not divide a row's blocks.
    """
    rows, in_ = x.shape
    if rows > MATVEC_ROWS or in_ % BLOCK:
        raise ValueError(f"matvec takes at most {MATVEC_ROWS} rows of whole blocks of {BLOCK} values, got {x.shape}")
    nested = weights[0].nested is not None
    if any((weight.nested is not None) != nested or weight.shape[1] != in_ for weight in weights):
        raise ValueError("weights of one matvec must share their input's width, and be nested all or none")
    outs, across = [weight.shape[0] for weight in weights], in_ // BLOCK
    tiles = tiles or tiles_for(rows, across, outs)
    if across % (tiles.blocks * tiles.split):
        raise ValueError(f"a row's {across} blocks must be whole steps of each part, got {tiles}")
    arguments, parts, tile, column = [], [], 0, 0
    for weight in weights:
        (at, table, codes, *levels), _, outer_blocks = _arguments(weight, layer)
        arguments = [*(arguments or [table]), at, codes.reshape(-1, in_ // 2), *levels]
        parts.append(Part(weight.shape[0], outer_blocks, tile, column))
        tile, column = tile + pl.cdiv(weight.shape[0], tiles.out), column + weight.shape[0]
    padded = 1 if rows == 1 else MATVEC_ROWS
    planes = jnp.pad(x, ((0, padded - rows), (0, 0))).reshape(padded, in_ // 2, 2).transpose(2, 0, 1)
    call = pl.pallas_call(
        partial(_kernel, parts=tuple(parts), tiles=tiles, across=across, rows=padded, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((tiles.split, padded, column), x.dtype if tiles.split == 1 else jnp.float32),
        grid=(tile, tiles.split),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="nf4_matvec",
    )
    y = call(*arguments, planes)[:, :rows]
    return y[0] if tiles.split == 1 else jnp.sum(y, axis=0).astype(x.dtype)
