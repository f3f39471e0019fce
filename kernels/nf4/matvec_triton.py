"""NF4 weights times few rows, as one Triton kernel: codes are decoded in registers and met by x there.

A program owns `TILE_OUT` rows of a weight and goes through its blocks of 64 values `TILE_BLOCKS` at a time; codes are looked
up by shuffles between the lanes of a warp (ptx.py). One row of x is multiplied in float32 lanes, and each block's sum is scaled
once; the next codes are fetched, eight a word, while the present ones are met. More rows go through the tensor cores, each
weight rounded to x's dtype as `dequantize` rounds it: there the two nibbles of a byte meet the even and the odd values of x,
read together as one word where they have 16 bits, so that nothing is interleaved. Where a weight is too small to fill the GPU,
`in` is split over programs whose float32 sums are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from triton import knobs

from jaxsloth.kernels.nf4.contract import BLOCK, MATVEC_ROWS, NESTED_BLOCK, NF4
from jaxsloth.kernels.nf4.ptx import HIGH, LOW, WORD
from jaxsloth.kernels.nf4.triton_kernel import _table

WEIGHTS = 3  # that one launch takes
PROCESSORS = 132  # of the GPU that the tiles are chosen for, an H200; any other runs them too
REDUCE = 512
INTERPRETED = knobs.runtime.interpret  # which runs no PTX
LOOKUPS = {"WORD": WORD, "HIGH": HIGH, "LOW": LOW}
LAUNCH = {"num_stages": 1, "enable_fp_fusion": True}
REDUCE_LAUNCH = {"num_warps": 4}


class Tiles(NamedTuple):
    """How a product is cut: rows of the weight and blocks of them a program handles at once, parts of `in`, warps a program."""

    out: int
    blocks: int
    split: int
    warps: int


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def _words(words, inside, first, end, WORDS: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    """int32 ``[TILE_OUT, TILE_BLOCKS * WORDS]`` from block `first` on, eight codes a word."""
    word = first * WORDS + tl.arange(0, TILE_BLOCKS * WORDS)
    mask = inside[:, None] & (word < end * WORDS)[None, :]
    return tl.load(words[:, None] + word[None, :], mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
@no_type_check
def _of_words(word, table, LOOKUP: tl.constexpr):
    """float32 ``[TILE_OUT, words * 8]``: each word's codes looked up, in the order of the values they stand for."""
    if LOOKUP is None:
        pair = tl.join(word, word >> 16)
        byte = tl.join(pair, pair >> 8)
        found = tl.load(table + (tl.join(byte >> 4, byte) & 15))  # the high nibble comes first
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            LOOKUP,
            "=f,=f,=f,=f,=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
        found = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    return tl.reshape(found, (word.shape[0], word.shape[1] * 8))


@triton.jit
@no_type_check
def _of_bytes(byte, table, PLACE: tl.constexpr, LOOKUP: tl.constexpr):
    """float32 of the nibbles from bit PLACE of each byte on."""
    if LOOKUP is None:
        found = tl.load(table + ((byte.to(tl.int32) >> PLACE) & 15))
    else:
        found = tl.inline_asm_elementwise(LOOKUP, "=f,=f,=f,=f,r", [byte], dtype=tl.float32, is_pure=True, pack=4)
    return found


@triton.jit
@no_type_check
def _pair(x, place, mask):
    """The values of x, `place` counting pairs, at an even and at the following channel; pairs of 16-bit values are one word."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    if DTYPE.primitive_bitwidth == 32:
        even, odd = tl.load(x + 2 * place, mask=mask, other=0.0), tl.load(x + 2 * place + 1, mask=mask, other=0.0)
    else:
        word = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + place, mask=mask, other=0)
        even, odd = word.to(tl.int16).to(DTYPE, bitcast=True), (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return even, odd


@triton.jit
@no_type_check
def _maxima(absmax, row, inside, first, end, blocks, TILE_BLOCKS: tl.constexpr):
    """What is stored of the maxima ``[TILE_OUT, TILE_BLOCKS]`` from block `first` on: themselves, or their codes."""
    block = first + tl.arange(0, TILE_BLOCKS)
    mask = inside[:, None] & (block < end)[None, :]
    return tl.load(absmax + row[:, None] * blocks + block[None, :], mask=mask, other=0)


@triton.jit
@no_type_check
def _scales(stored, outer, offset, book, index, mask, NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr):
    """The float32 scale of every block, 0 outside the mask."""
    if NESTED:
        product = tl.load(book + stored.to(tl.int32)) * tl.load(outer + index // NESTED_SIZE, mask=mask, other=0.0)
        scale = tl.where(mask, product + tl.load(offset), 0.0)
    else:
        scale = stored
    return scale


@triton.jit
@no_type_check
def matvec_kernel(
    x,
    y,
    bias,
    table,
    codes0,
    absmax0,
    outer0,
    offset0,
    book0,
    codes1,
    absmax1,
    outer1,
    offset1,
    book1,
    codes2,
    absmax2,
    outer2,
    offset2,
    book2,
    rows,
    x_stride,
    row_bytes,
    blocks,
    blocks_each,
    out0,
    out1,
    out2,
    NESTED: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    BIASED: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WORD: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
):
    PAIRS: tl.constexpr = SIZE // 2
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles0, tiles1 = tl.cdiv(out0, TILE_OUT), tl.cdiv(out1, TILE_OUT)
    total = out0 + out1 + out2
    codes, absmax, outer, offset, book, out, column = codes0, absmax0, outer0, offset0, book0, out0, 0
    if tile >= tiles0 + tiles1:
        codes, absmax, outer, offset, book, out, column = codes2, absmax2, outer2, offset2, book2, out2, out0 + out1
        tile -= tiles0 + tiles1
    elif tile >= tiles0:
        codes, absmax, outer, offset, book, out, column = codes1, absmax1, outer1, offset1, book1, out1, out0
        tile -= tiles0
    row = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    inside = row < out
    start = part * blocks_each
    end = tl.minimum(start + blocks_each, blocks)
    sums = tl.zeros((TILE_OUT, TILE_BLOCKS if ROWS == 1 else ROWS), tl.float32)
    start_of_row = codes + row.to(tl.int64) * row_bytes
    if ROWS == 1:
        words = start_of_row.to(tl.pointer_type(tl.int32), bitcast=True)
        fetched = _words(words, inside, start, end, SIZE // 8, TILE_BLOCKS)
    coming = _maxima(absmax, row, inside, start, end, blocks, TILE_BLOCKS)
    for first in range(start, end, TILE_BLOCKS):
        # Loads keep their order, so that those of the next step stand before what waits for this one's.
        if ROWS == 1:
            word = fetched
            fetched = _words(words, inside, first + TILE_BLOCKS, end, SIZE // 8, TILE_BLOCKS)
        stored = coming
        coming = _maxima(absmax, row, inside, first + TILE_BLOCKS, end, blocks, TILE_BLOCKS)
        block = first + tl.arange(0, TILE_BLOCKS)
        mask = inside[:, None] & (block < end)[None, :]
        index = row[:, None] * blocks + block[None, :]
        if ROWS == 1:
            scale = _scales(stored, outer, offset, book, index, mask, NESTED, NESTED_SIZE)
            channel = first * SIZE + tl.arange(0, TILE_BLOCKS * SIZE)
            own = tl.load(x + channel, mask=channel < end * SIZE, other=0.0).to(tl.float32)
            product = _of_words(word, table, WORD) * own[None, :]
            sums += tl.sum(tl.reshape(product, (TILE_OUT, TILE_BLOCKS, SIZE)), axis=2) * scale
        else:
            # Not fetched a step ahead: bytes that a loop carries are taken apart and put together again.
            place = block[None, :, None] * PAIRS + tl.arange(0, PAIRS)[None, None, :]
            byte = tl.load(start_of_row[:, None, None] + place, mask=mask[:, :, None], other=0, eviction_policy="evict_first")
            scale = _scales(stored, outer, offset, book, index, mask, NESTED, NESTED_SIZE)
            pair, which = first * PAIRS + tl.arange(0, TILE_BLOCKS * PAIRS), tl.arange(0, ROWS)[None, :]
            even, odd = _pair(x, which * x_stride + pair[:, None], (pair < end * PAIRS)[:, None] & (which < rows))
            high = (_of_bytes(byte, table, 4, HIGH) * scale[:, :, None]).to(x.dtype.element_ty)
            low = (_of_bytes(byte, table, 0, LOW) * scale[:, :, None]).to(x.dtype.element_ty)
            sums = tl.dot(tl.reshape(high, (TILE_OUT, TILE_BLOCKS * PAIRS)), even, sums, input_precision="ieee")
            sums = tl.dot(tl.reshape(low, (TILE_OUT, TILE_BLOCKS * PAIRS)), odd, sums, input_precision="ieee")
    if ROWS == 1:
        result = tl.sum(sums, axis=1)
        place, kept = column + row + part * total, inside
    else:
        which = tl.arange(0, ROWS)
        result = sums
        place = (column + row)[:, None] + (part * rows + which)[None, :] * total
        kept = inside[:, None] & (which < rows)[None, :]
    if BIASED:
        added = tl.load(bias + column + row, mask=inside, other=0.0).to(tl.float32)
        result += added if ROWS == 1 else added[:, None]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=kept)


@triton.jit
@no_type_check
def add_parts_kernel(parts, bias, y, size, width, BIASED: tl.constexpr, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < size
    total = tl.zeros((SIZE,), tl.float32)
    for part in range(SPLIT):
        total += tl.load(parts + part * size + place, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias + place % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


def tiles_for(rows: int, blocks: int, outs: Sequence[int]) -> Tiles:
    """Tiles that give every processor enough to do, the fastest of those tried with an 8B model's layers (docs/performance.md).
    For one row a program is a single warp, which waits for no other; for more it is the four warps of a tensor-core tile."""
    out, across, warps, most = (4, 16, 1, 16) if rows == 1 else (64, 2, 4, 8)
    wanted = 15 * PROCESSORS
    if rows == 1 and 2 * sum(triton.cdiv(one, out) for one in outs) < wanted:
        out = 2
    programs, split = sum(triton.cdiv(one, out) for one in outs), 1
    while 2 * programs * split <= wanted and split < most and blocks // (split * 2) >= across:
        split *= 2
    return Tiles(out, across, split, warps)


def _levels(weight: NF4) -> tuple[Any, ...]:
    nested, codes = weight.nested, weight.codes
    if nested is None:  # the pointers of a second level are never read then; any will do
        return codes, weight.absmax, weight.absmax, weight.absmax, weight.absmax
    return codes, weight.absmax, nested.absmax, nested.offset, nested.code


@torch.no_grad()
def matvec(
    x: Float[torch.Tensor, "rows in"], weights: Sequence[NF4], bias: Float[torch.Tensor, " out"] | None = None
) -> Float[torch.Tensor, "rows out"]:
    """As torch_ops' function of this name, on CUDA.

    Raises:
        ValueError: more rows or weights than the kernel takes, values of x that lie apart, rows that are not whole blocks, or
            nested weights beside others.
    """
    rows, in_ = x.shape
    outs, nested = [weight.shape[0] for weight in weights], weights[0].nested is not None
    if not 1 <= rows <= MATVEC_ROWS or not 1 <= len(weights) <= WEIGHTS or in_ % BLOCK or x.stride(1) != 1:
        raise ValueError(
            f"matvec takes 1 to {MATVEC_ROWS} rows of whole blocks of {BLOCK} values and 1 to {WEIGHTS} weights, got "
            f"{tuple(x.shape)} of strides {x.stride()} and {len(weights)}"
        )
    if any((weight.nested is not None) != nested or weight.shape[1] != in_ for weight in weights):
        raise ValueError("weights of one matvec must share their input's width, and be nested all or none")
    blocks, total = in_ // BLOCK, sum(outs)
    tiles = tiles_for(rows, blocks, outs)
    y = torch.empty(rows, total, dtype=x.dtype, device=x.device)
    parts = y
    if x.stride(0) % 2 or x.data_ptr() % 4:  # pairs must be whole
        x = x.clone(memory_format=torch.contiguous_format)
    if tiles.split > 1:
        parts = torch.empty(tiles.split, rows, total, dtype=torch.float32, device=x.device)
    levels = [_levels(weights[min(place, len(weights) - 1)]) for place in range(WEIGHTS)]
    outs += [0] * (WEIGHTS - len(outs))
    added, biased = (x if bias is None else bias), bias is not None
    launch: dict[str, Any] = LAUNCH | {"num_warps": tiles.warps}
    with torch.cuda.device_of(x):
        pointers = [pointer for level in levels for pointer in level]
        counts = (
            rows,
            x.stride(0) // 2,
            in_ // 2,
            blocks,
            triton.cdiv(triton.cdiv(blocks, tiles.split), tiles.blocks) * tiles.blocks,
        )
        matvec_kernel[(sum(triton.cdiv(one, tiles.out) for one in outs), tiles.split)](
            *(x, parts, added, _table(x.device), *pointers, *counts, *outs),
            NESTED=nested,
            NESTED_SIZE=NESTED_BLOCK,
            BIASED=biased and tiles.split == 1,
            SIZE=BLOCK,
            ROWS=1 if rows == 1 else MATVEC_ROWS,
            TILE_OUT=tiles.out,
            TILE_BLOCKS=tiles.blocks,
            **(dict.fromkeys(LOOKUPS) if INTERPRETED else LOOKUPS),
            **launch,
        )
        if tiles.split > 1:
            add_parts_kernel[(triton.cdiv(rows * total, REDUCE),)](
                parts, added, y, rows * total, total, BIASED=biased, SPLIT=tiles.split, SIZE=REDUCE, **REDUCE_LAUNCH
            )
    return y
