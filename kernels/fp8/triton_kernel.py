"""Matrices in 8 bits by Triton: rows of activations, NF4 weights in either orientation, the adapters' blocks.

quantize_rows: a program a row, read once where it fits into registers and else twice (the second time from the caches).
nf4_into: a tile of codes and maxima in, a tile of e4m3 out, turned over on the way where the transposed weight is asked for;
nothing lies between. AdapterCopy: one launch over a table of pieces for all factors, and one to write them all.

Casts to e4m3 saturate and keep NaN, as the hardware's instruction does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl

from jaxsloth.kernels.fp8.contract import LARGEST, SMALLEST, AdapterBlock, Rows
from jaxsloth.kernels.fp8.torch_ops import E4M3, dense_into, round_up
from jaxsloth.kernels.nf4.contract import BLOCK, NESTED_BLOCK, NF4
from jaxsloth.kernels.nf4.triton_kernel import _table

__all__ = ["AdapterCopy", "dense_into", "nf4_into", "quantize_rows"]

WHOLE = 8192  # the longest row that is read once
PART = 4096  # of a longer one
TILES = {False: (16, 8), True: (128, 1)}  # rows and blocks of 64 columns of the weight, by whether it is turned over
ROWS, COLUMNS = 32, 64  # of the tile that a program of `AdapterCopy` handles
FIELDS = 11
LAUNCH = {"num_warps": 4}
ROW_LAUNCH = {"num_warps": 8}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def quantize_kernel(
    x,
    behind,
    factor,
    values,
    scales,
    width,
    extra,
    x_stride,
    behind_stride,
    EXTENDS: tl.constexpr,
    ONCE: tl.constexpr,
    PEAK: tl.constexpr,
    LEAST: tl.constexpr,
    SIZE: tl.constexpr,
    EXTRA: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    values += row * (width + extra)
    column = tl.arange(0, SIZE)
    highest = tl.zeros([SIZE], tl.float32)
    if ONCE:
        kept = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        highest = tl.abs(kept)
    else:
        for start in range(0, width, SIZE):
            part = tl.load(x + start + column, mask=start + column < width, other=0.0).to(tl.float32)
            highest = tl.maximum(highest, tl.abs(part))
    peak = tl.maximum(tl.max(highest, 0), LEAST)
    if EXTENDS:
        place = tl.arange(0, EXTRA)
        tail = tl.load(behind + row * behind_stride + place, mask=place < extra, other=0.0).to(tl.float32) * tl.load(factor)
        peak = tl.maximum(peak, tl.max(tl.abs(tail), 0))
    inverse = tl.div_rn(PEAK, peak)
    tl.store(scales + row, tl.div_rn(peak, PEAK))
    element: tl.constexpr = values.dtype.element_ty
    if EXTENDS:
        tl.store(values + width + place, (tail * inverse).to(element), mask=place < extra)
    if ONCE:
        tl.store(values + column, (kept * inverse).to(element), mask=column < width)
    else:
        for start in range(0, width, SIZE):
            part = tl.load(x + start + column, mask=start + column < width, other=0.0).to(tl.float32)
            tl.store(values + start + column, (part * inverse).to(element), mask=start + column < width)


def quantize_rows(x: torch.Tensor, behind: torch.Tensor | None = None, factor: torch.Tensor | None = None) -> Rows:
    rows, width = x.shape
    extra = 0 if behind is None else behind.shape[1]
    values = torch.empty(rows, width + extra, dtype=E4M3, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    quantize_rows_into(x, behind, factor, values, scales)
    return Rows(values, scales)


def quantize_rows_into(
    x: torch.Tensor, behind: torch.Tensor | None, factor: torch.Tensor | None, values: torch.Tensor, scales: torch.Tensor
) -> None:
    """values contiguous ``[rows, width + n]``; scales ``[rows, 1]``."""
    rows, width = x.shape
    if rows == 0:
        return
    once = width <= WHOLE
    if behind is not None and factor is None:
        factor = torch.ones(1, device=x.device)
    with torch.cuda.device_of(x):
        quantize_kernel[(rows,)](
            x,
            x if behind is None else behind,
            scales if factor is None else factor,  # never read
            values,
            scales,
            width,
            values.shape[1] - width,
            x.stride(0),
            0 if behind is None else behind.stride(0),
            EXTENDS=behind is not None,
            ONCE=once,
            PEAK=LARGEST,
            LEAST=SMALLEST,
            SIZE=triton.next_power_of_2(width) if once else PART,
            EXTRA=triton.next_power_of_2(max(values.shape[1] - width, 1)),
            **ROW_LAUNCH,
        )


@triton.jit
@no_type_check
def nf4_kernel(
    codes,
    absmax,
    table,
    nested_absmax,
    nested_code,
    nested_offset,
    inverse,
    target,
    rows,
    row_blocks,
    stride,
    NESTED: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    half: tl.constexpr = BLOCK_SIZE // 2
    width: tl.constexpr = TILE_BLOCKS * BLOCK_SIZE
    # int64: a matrix may have more than 2**31 elements.
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    across = tl.program_id(1) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    inside = (row < rows)[:, None] & (across < row_blocks)[None, :]
    block = row[:, None] * row_blocks + across[None, :]
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED_SIZE, mask=inside, other=0.0)
        scale = tl.load(nested_code + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    pair = block[:, :, None] * half + tl.arange(0, half)[None, None, :]
    byte = tl.load(codes + pair, mask=inside[:, :, None], other=0).to(tl.int32)
    high = tl.load(table + (byte >> 4)) * scale[:, :, None]
    low = tl.load(table + (byte & 15)) * scale[:, :, None]
    value = tl.reshape(tl.interleave(high, low), (TILE_ROWS, width))
    column = tl.program_id(1) * width + tl.arange(0, width)
    within = column < row_blocks * BLOCK_SIZE
    mask = (row < rows)[:, None] & within[None, :]
    if TRANSPOSED:
        value = value * tl.load(inverse + column, mask=within, other=0.0)[None, :]
        place = column.to(tl.int64)[:, None] * stride + row[None, :]
        tl.store(target + place, tl.trans(value.to(target.dtype.element_ty)), mask=tl.trans(mask))
    else:
        value = value * tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        tl.store(target + row[:, None] * stride + column[None, :], value.to(target.dtype.element_ty), mask=mask)


def nf4_into(quantized: NF4, inverse: torch.Tensor, target: torch.Tensor, *, transposed: bool = False) -> None:
    """See the contract.

    Raises:
        ValueError: the weight's rows are not whole blocks.
    """
    codes, absmax, nested = quantized.codes, quantized.absmax, quantized.nested
    rows, width = quantized.shape
    if width % BLOCK:
        raise ValueError(f"rows must be a multiple of {BLOCK} values long, and these have {width}")
    # Without a second level its pointers are never read; any will do.
    second = (absmax, absmax, absmax) if nested is None else (nested.absmax, nested.code, nested.offset)
    tile_rows, tile_blocks = TILES[transposed]
    with torch.cuda.device_of(codes):
        nf4_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(width // BLOCK, tile_blocks))](
            codes,
            absmax,
            _table(codes.device),
            *second,
            inverse,
            target,
            rows,
            width // BLOCK,
            target.stride(0),
            NESTED=nested is not None,
            NESTED_SIZE=NESTED_BLOCK,
            TRANSPOSED=transposed,
            BLOCK_SIZE=BLOCK,
            TILE_ROWS=tile_rows,
            TILE_BLOCKS=tile_blocks,
            **LAUNCH,
        )


@triton.jit
@no_type_check
def margins_kernel(
    table,
    scales,
    like,
    WRITES: tl.constexpr,
    PEAK: tl.constexpr,
    TABLE_FIELDS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WRITES: write the targets; else raise the factors to what the sources need."""
    piece, tile = tl.program_id(0), tl.program_id(1)
    entry = table + piece * TABLE_FIELDS
    source = tl.load(entry).to(tl.pointer_type(tl.float32))
    inverse = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    factor = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    target = tl.load(entry + 3).to(tl.pointer_type(like.dtype.element_ty))
    row_stride, column_stride, stride = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    rows, columns = tl.load(entry + 7).to(tl.int32), tl.load(entry + 8).to(tl.int32)
    first, count = tl.load(entry + 9).to(tl.int32), tl.load(entry + 10).to(tl.int32)
    across = (columns + WIDTH - 1) // WIDTH
    row = (tile // across * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    column = (tile % across * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (row < rows) & (column < columns)
    own = inside & (column >= first) & (column < first + count)
    value = tl.load(source + row * row_stride + (column - first) * column_stride, mask=own, other=0.0)
    value = value * tl.load(inverse + row, mask=row < rows, other=0.0)
    scale = tl.load(scales + piece)
    if WRITES:
        value = value * tl.div_rn(scale, tl.load(factor))
        tl.store(target + row * stride + column, value.to(like.dtype.element_ty), mask=inside)
    else:
        highest = tl.max(tl.max(tl.abs(value), 1), 0)
        tl.atomic_max(factor, highest * (tl.abs(scale) / PEAK))


class AdapterCopy:
    """Pieces whose addresses stay; like: any tensor of the targets' dtype and device."""

    def __init__(self, pieces: Sequence[AdapterBlock], like: torch.Tensor) -> None:
        rows = []
        for piece in pieces:
            height, width = piece.target.shape
            source = piece.inverse if piece.source is None else piece.source
            strides, count = ((0, 0), 0) if piece.source is None else (source.stride(), source.shape[1])
            addresses = [tensor.data_ptr() for tensor in (source, piece.inverse, piece.factor, piece.target)]
            rows.append([*addresses, *strides, piece.target.stride(0), height, width, piece.first, count])
        self._pieces, self._like = tuple(pieces), like  # keeps the memory behind the addresses alive
        self._table = torch.tensor(rows, dtype=torch.int64, device=like.device)
        self._scales = torch.tensor([piece.scale for piece in pieces], dtype=torch.float32, device=like.device)
        self._tiles = max((triton.cdiv(row[7], ROWS) * triton.cdiv(row[8], COLUMNS) for row in rows), default=0)

    def reach(self, factors: torch.Tensor) -> None:
        """Sets every piece's factor; `factors` is the array that they are elements of."""
        factors.fill_(1.0)
        self._launch(writes=False)
        round_up(factors)

    def run(self) -> None:
        self._launch(writes=True)

    def _launch(self, writes: bool) -> None:
        if self._tiles:
            with torch.cuda.device_of(self._like):
                margins_kernel[(len(self._pieces), self._tiles)](
                    self._table,
                    self._scales,
                    self._like,
                    WRITES=writes,
                    PEAK=LARGEST,
                    TABLE_FIELDS=FIELDS,
                    HEIGHT=ROWS,
                    WIDTH=COLUMNS,
                    **LAUNCH,
                )
