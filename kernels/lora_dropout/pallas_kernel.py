"""LoRA's A behind a dropout as Pallas kernels (lowered through Triton) that draw the masks in registers.

A tile is some tokens times some counters, the first eighth of the channels; one call of the generator for each makes the
decisions of eight tiles of x that lie an eighth of the channels apart. x is never written masked, and the scale of kept
elements is applied to sums. `project` and `gradient_a` cut their sums in a number of parts that the shapes fix. Why zeros are
XORed into the words: triton_parts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32

from jaxsloth.kernels.dropout.contract import HALVES, MULTIPLIERS, ROUNDS, WEYL, kept_scale, share_of, threshold
from jaxsloth.kernels.dropout.xla_ops import high_word
from jaxsloth.kernels.jax_platform import dot_float32
from jaxsloth.kernels.lora_dropout import xla_ops
from jaxsloth.kernels.lora_dropout.contract import Masks


class Tiles(NamedTuple):
    """As in triton_kernel.py."""

    tokens: int
    counters: int
    ranks: int
    warps: int = 4
    stages: int = 1
    programs: int = 792


PROJECT, INPUT, GRADIENT = Tiles(64, 32, 128), Tiles(64, 16, 64), Tiles(64, 32, 32)


class Drawn(NamedTuple):
    """What is fixed about masks, and of the modules that a kernel takes at once: how many columns each has, how many of them a
    program handles, and in how many blocks."""

    bar: int
    tokens: int
    length: int
    first: int
    channels: int
    rank: int
    tile: int
    blocks: int
    interpret: bool

    @property
    def share(self) -> int:
        return share_of(self.channels)


def _high(word: Any, factor: int, interpret: bool) -> Any:
    """The upper half of a product; Pallas' interpreter runs no PTX."""
    if interpret:
        return high_word(word, factor)
    return _words_by_ptx(f"mul.hi.u32 $0, $1, {factor:#x};", word, "=r,r")


def _words_by_ptx(ptx: str, values: Any, constraints: str, pack: int = 1) -> Any:
    # Pallas knows no unsigned type of what PTX returns.
    kind = [jax.ShapeDtypeStruct(values.shape, jnp.int32)]
    found = plgpu.elementwise_inline_asm(ptx, args=[values], constraints=constraints, pack=pack, result_shape_dtypes=kind)
    return found[0].astype(jnp.uint32)


def _decide(word: Any, bar: int) -> Any:
    """Both halves of a word compared with the threshold at once: bits 15 and 31 are set where they reach it."""
    compared = (word & jnp.uint32(0x7FFF7FFF)) + jnp.uint32((0x8000 - bar % 0x8000) * 0x10001)
    return compared | word if bar < 0x8000 else compared & word


def _decisions(drawn: Drawn, key: Any, module_word: Any, place: Any, token: Any, rows: Any, zeros: Any) -> list[Any]:
    """Philox's four words at the counters ``(place, position, row, 0)``, decided. What depends on the token or on the place
    alone is formed for it alone."""
    flat = drawn.first + token
    at = jnp.where(token < drawn.tokens, jax.lax.div(flat, jnp.int32(drawn.length)), 0)
    a, c = place.astype(jnp.uint32)[None, :], rows[at].astype(jnp.uint32)[:, None]
    b = jax.lax.rem(flat, jnp.int32(drawn.length)).astype(jnp.uint32)[:, None]
    d, k0, k1 = jnp.zeros_like(a), key[0] ^ module_word, key[1]
    high = partial(_high, interpret=drawn.interpret)
    for turn in range(ROUNDS):
        a, b, c, d = (
            high(c, MULTIPLIERS[1]) ^ (b ^ k0),
            c * jnp.uint32(MULTIPLIERS[1]),
            high(a, MULTIPLIERS[0]) ^ (d ^ k1),
            a * jnp.uint32(MULTIPLIERS[0]),
        )
        if turn == 1:  # from here on they are as wide as a tile
            a, c = a ^ zeros, c ^ zeros
        k0, k1 = k0 + jnp.uint32(WEYL[0]), k1 + jnp.uint32(WEYL[1])
    shape = (token.shape[0], place.shape[0])
    return [_decide(jnp.broadcast_to(word, shape), drawn.bar) for word in (a, b, c, d)]


def _kept(values: Any, words: list[Any], part: int, interpret: bool) -> Any:
    """Values, or zeros where they are dropped; pairs of 16-bit values at once, as in triton_parts.py."""
    word = words[part // 2]
    if interpret or values.dtype == jnp.float32:
        bit = jnp.uint32(0x80000000 if part % 2 else 0x8000)
        return jnp.where((word & bit) != 0, values, jnp.zeros((), values.dtype))
    selector = "0xFFBB" if part % 2 else "0xDD99"
    ptx = f"{{ .reg .b32 keep; prmt.b32 keep, $2, $3, {selector}; and.b32 $0, $1, keep; }}"
    kind = [jax.ShapeDtypeStruct(values.shape, values.dtype)]
    return plgpu.elementwise_inline_asm(ptx, args=[values, word], constraints="=r,r,r,r", pack=2, result_shape_dtypes=kind)[0]


def _zeros_like(values: Any, interpret: bool) -> Any:
    """Zeros laid out as values are."""
    if interpret:
        return jnp.zeros(values.shape, jnp.uint32)
    if values.dtype == jnp.float32:
        return _words_by_ptx("mov.u32 $0, 0;", values, "=r,r")
    return _words_by_ptx("mov.u32 $0, 0; mov.u32 $1, 0;", values, "=r,=r,r", pack=2)


def _tile(ref: Any, row: Any, column: Any, row_inside: Any, column_inside: Any) -> Any:
    """``ref[row, column]``, zeros outside."""
    inside = row_inside[:, None] & column_inside[None, :]
    return plgpu.load(ref.at[jnp.where(row_inside, row, 0)[:, None], column[None, :]], mask=inside, other=0.0)


def _range(start: Any, size: int) -> Any:
    return start * size + jnp.arange(size, dtype=jnp.int32)


def _block(drawn: Drawn, index: Any) -> tuple[Any, Any]:
    """(the module, its columns that are a program's)."""
    blocks = jnp.int32(drawn.blocks)
    return jax.lax.div(index, blocks), _range(jax.lax.rem(index, blocks), drawn.tile)


def _channels(drawn: Drawn, place: Any, part: int) -> tuple[Any, Any]:
    """(an eighth's channels, which there are)."""
    channel = part * drawn.share + place
    return channel, (place < drawn.share) & (channel < drawn.channels)


def _project_kernel(
    x: Any, a: Any, key: Any, words: Any, rows: Any, out: Any, *, drawn: Drawn, tiles: Tiles, steps: int
) -> None:
    """Programs: (modules times blocks of their ranks, tiles of tokens, parts)."""
    module, rank = _block(drawn, pl.program_id(0))
    token, part = _range(pl.program_id(1), tiles.tokens), pl.program_id(2)
    seen, own = token < drawn.tokens, rank < drawn.rank
    word = words[module]

    def add(step: Any, total: Any) -> Any:
        place = _range(part * steps + step, tiles.counters)
        cut = [_channels(drawn, place, each) for each in range(HALVES)]
        values = [_tile(x, token, channel, seen, inside) for channel, inside in cut]
        zeros = _zeros_like(values[0], drawn.interpret)
        decided = _decisions(drawn, key, word, place, token, rows, zeros)
        for each, (channel, inside) in enumerate(cut):
            matrix = _tile(a, module * drawn.rank + rank, channel, own, inside)
            total += dot_float32(_kept(values[each], decided, each, drawn.interpret), matrix, (1, 1))
        return total

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((tiles.tokens, drawn.tile), jnp.float32))
    target = out.at[part, token[:, None], (module * drawn.rank + rank)[None, :]]
    plgpu.store(target, total, mask=seen[:, None] & own[None, :])


def _input_kernel(
    dx: Any, g: Any, a: Any, key: Any, words: Any, rows: Any, out: Any, *, drawn: Drawn, tiles: Tiles, count: int, scale: float
) -> None:
    """Programs: (tiles of counters, tiles of tokens)."""
    place, token = _range(pl.program_id(0), tiles.counters), _range(pl.program_id(1), tiles.tokens)
    seen, cut = token < drawn.tokens, [_channels(drawn, place, each) for each in range(HALVES)]

    def add(index: Any, totals: tuple[Any, ...]) -> tuple[Any, ...]:
        module, rank = _block(drawn, index)
        column, own = module * drawn.rank + rank, rank < drawn.rank
        grads = _tile(g, token, column, seen, own)
        products = [dot_float32(grads, _tile(a, column, channel, own, inside), (1, 0)) for channel, inside in cut]
        zeros = _zeros_like(products[0], drawn.interpret)
        decided = _decisions(drawn, key, words[module], place, token, rows, zeros)
        kept = (_kept(product, decided, each, drawn.interpret) for each, product in enumerate(products))
        return tuple(total + one for total, one in zip(totals, kept, strict=True))

    zeros = jnp.zeros((tiles.tokens, tiles.counters), jnp.float32)
    totals = jax.lax.fori_loop(0, count * drawn.blocks, add, (zeros,) * HALVES)
    for total, (channel, inside) in zip(totals, cut, strict=True):
        before = _tile(dx, token, channel, seen, inside).astype(jnp.float32)
        value, mask = (before + total * scale).astype(out.dtype), seen[:, None] & inside[None, :]
        plgpu.store(out.at[token[:, None], channel[None, :]], value, mask=mask)


def _gradient_kernel(
    g: Any, x: Any, key: Any, words: Any, rows: Any, out: Any, *, drawn: Drawn, tiles: Tiles, steps: int, scale: float
) -> None:
    """Programs: (modules times blocks of their ranks, tiles of counters, parts)."""
    module, rank = _block(drawn, pl.program_id(0))
    place, part = _range(pl.program_id(1), tiles.counters), pl.program_id(2)
    column, own, word = module * drawn.rank + rank, rank < drawn.rank, words[module]
    cut = [_channels(drawn, place, each) for each in range(HALVES)]

    def add(step: Any, totals: tuple[Any, ...]) -> tuple[Any, ...]:
        token = _range(part * steps + step, tiles.tokens)
        seen = token < drawn.tokens
        values = [_tile(x, token, channel, seen, inside) for channel, inside in cut]
        zeros = _zeros_like(values[0], drawn.interpret)
        decided = _decisions(drawn, key, word, place, token, rows, zeros)
        grads = _tile(g, token, column, seen, own)
        kept = [_kept(value, decided, each, drawn.interpret) for each, value in enumerate(values)]
        return tuple(total + dot_float32(grads, one, (0, 0)) for total, one in zip(totals, kept, strict=True))

    zeros = jnp.zeros((drawn.tile, tiles.counters), jnp.float32)
    totals = jax.lax.fori_loop(0, steps, add, (zeros,) * HALVES)
    for total, (channel, inside) in zip(totals, cut, strict=True):
        mask = own[:, None] & inside[None, :]
        plgpu.store(out.at[part, column[:, None], channel[None, :]], total * scale, mask=mask)


class Run(NamedTuple):
    """Neighbouring modules of one rank: which, what is fixed of them, and their columns."""

    modules: slice
    count: int
    columns: slice
    drawn: Drawn


def _runs(masks: Masks, most: int, tokens: int, channels: int, interpret: bool) -> list[Run]:
    found, bar = [], threshold(masks.rate)
    for module, count, column, rank in masks.runs():
        tile = max(16, min(pl.next_power_of_2(rank), most))
        blocks = pl.cdiv(rank, tile)
        drawn = Drawn(bar, tokens, masks.length, masks.first, channels, rank, tile, blocks, interpret)
        found.append(Run(slice(module, module + count), count, slice(column, column + count * rank), drawn))
    return found


def _cut(steps: int, programs: int, tiles: Tiles) -> tuple[int, int]:
    """(parts of a sum of so many steps, steps of each), so that there are programs enough."""
    each = pl.cdiv(steps, min(steps, pl.cdiv(tiles.programs, programs)))
    return pl.cdiv(steps, each), each


def _programs(runs: list[Run]) -> int:
    return sum(run.count * run.drawn.blocks for run in runs)


def _launch(
    kernel: Callable[..., None], name: str, tiles: Tiles, grid: tuple[int, ...], out: Any, interpret: bool, **more: Any
):
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(*out),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=name,
        **more,
    )


def project(
    x: Float[Array, "tokens wide"],
    a_packed: Float[Array, "pad in"],
    masks: Masks,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "tokens pad"]:
    """See the contract."""
    tiles = tiles or PROJECT
    tokens, (pad, channels) = x.shape[0], a_packed.shape
    runs, across = _runs(masks, tiles.ranks, tokens, channels, interpret), pl.cdiv(tokens, tiles.tokens)
    parts, steps = _cut(pl.cdiv(share_of(channels), tiles.counters), _programs(runs) * across, tiles)
    found = []
    for run in runs:
        kernel = partial(_project_kernel, drawn=run.drawn, tiles=tiles, steps=steps)
        grid, shape = (run.count * run.drawn.blocks, across, parts), (parts, tokens, run.count * run.drawn.rank)
        call = _launch(kernel, "lora_dropout_project", tiles, grid, (shape, jnp.float32), interpret)
        found.append(call(x, a_packed[run.columns], masks.key, masks.modules[run.modules], masks.rows))
    xa = jnp.concatenate(found, axis=2).sum(axis=0) * kept_scale(masks.rate)
    return jnp.pad(xa.astype(x.dtype), ((0, 0), (0, pad - masks.rank)))


def input_gradient(
    dx: Float[Array, "tokens in"],
    g: Float[Array, "tokens pad"],
    a_packed: Float[Array, "pad in"],
    masks: Masks,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float[Array, "tokens in"]:
    """See the contract."""
    tiles = tiles or INPUT
    tokens, channels = dx.shape
    grid = pl.cdiv(share_of(channels), tiles.counters), pl.cdiv(tokens, tiles.tokens)
    for run in _runs(masks, tiles.ranks, tokens, channels, interpret):
        kernel = partial(_input_kernel, drawn=run.drawn, tiles=tiles, count=run.count, scale=kept_scale(masks.rate))
        out = dx.shape, dx.dtype
        call = _launch(kernel, "lora_dropout_input", tiles, grid, out, interpret, input_output_aliases={0: 0})
        own = masks.modules[run.modules]
        dx = call(dx, g[:, run.columns], a_packed[run.columns], masks.key, own, masks.rows)
    return dx


def gradient_a(
    g: Float[Array, "tokens pad"],
    x: Float[Array, "tokens wide"],
    masks: Masks,
    channels: int,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> Float32[Array, "rank in"]:
    """See the contract. channels: `in`."""
    tiles = tiles or GRADIENT
    tokens = x.shape[0]
    runs = _runs(masks, tiles.ranks, tokens, channels, interpret)
    across = pl.cdiv(share_of(channels), tiles.counters)
    parts, steps = _cut(pl.cdiv(tokens, tiles.tokens), _programs(runs) * across, tiles)
    found = []
    for run in runs:
        kernel = partial(_gradient_kernel, drawn=run.drawn, tiles=tiles, steps=steps, scale=kept_scale(masks.rate))
        grid, shape = (run.count * run.drawn.blocks, across, parts), (parts, run.count * run.drawn.rank, channels)
        call = _launch(kernel, "lora_dropout_gradient", tiles, grid, (shape, jnp.float32), interpret)
        found.append(call(g[:, run.columns], x, masks.key, masks.modules[run.modules], masks.rows).sum(axis=0))
    return jnp.concatenate(found)


def lora_dropout(
    x: Float[Array, "tokens in"], a: Float32[Array, "rank in"], masks: Masks, *, interpret: bool = False
) -> Float[Array, "tokens rank"]:
    """See the contract."""
    return xla_ops.differentiable(x, a, masks, _Products, interpret)


class _Products:
    project, input_gradient, gradient_a = staticmethod(project), staticmethod(input_gradient), staticmethod(gradient_a)
