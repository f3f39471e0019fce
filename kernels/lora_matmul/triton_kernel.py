"""Adapters into their blocks of augmented weights: one launch casts and places any number of float32 matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl

from jaxsloth.kernels.lora_matmul.extended import AdapterBlock
from jaxsloth.kernels.nf4.triton_kernel import dequantize_into

__all__ = ["AdapterCopy", "dequantize_into"]

ROWS, COLUMNS = 32, 64  # of the tile that a program writes
FIELDS = 7
LAUNCH = {"num_warps": 4}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def place_kernel(table, scales, like, TABLE_FIELDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    piece, tile = tl.program_id(0), tl.program_id(1)
    entry = table + piece * TABLE_FIELDS
    source = tl.load(entry).to(tl.pointer_type(tl.float32))
    target = tl.load(entry + 1).to(tl.pointer_type(like.dtype.element_ty))
    rows, columns, stride = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32), tl.load(entry + 4)
    first, count = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    across = (columns + WIDTH - 1) // WIDTH
    row = (tile // across * HEIGHT + tl.arange(0, HEIGHT))[:, None]
    column = (tile % across * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (row < rows) & (column < columns)
    own = inside & (column >= first) & (column < first + count)
    value = tl.load(source + row * count + column - first, mask=own, other=0.0) * tl.load(scales + piece)
    # int64: a matrix may have more than 2**31 elements.
    tl.store(target + row.to(tl.int64) * stride + column, value.to(like.dtype.element_ty), mask=inside)


class AdapterCopy:
    """Pieces whose addresses stay: `run` writes them all.

    Raises:
        ValueError: a source is not contiguous.
    """

    def __init__(self, pieces: Sequence[AdapterBlock], like: torch.Tensor) -> None:
        rows, scales = [], []
        for piece in pieces:
            height, width = piece.target.shape
            count = 0 if piece.source is None else piece.source.shape[1]
            if piece.source is not None and not piece.source.is_contiguous():
                raise ValueError("a source must be contiguous")
            source = piece.target if piece.source is None else piece.source
            rows.append([source.data_ptr(), piece.target.data_ptr(), height, width, piece.target.stride(0), piece.first, count])
            scales.append(piece.scale)
        self._pieces, self._like = tuple(pieces), like  # keeps the memory behind the addresses alive
        self._table = torch.tensor(rows, dtype=torch.int64, device=like.device)
        self._scales = torch.tensor(scales, dtype=torch.float32, device=like.device)
        self._tiles = max((triton.cdiv(row[2], ROWS) * triton.cdiv(row[3], COLUMNS) for row in rows), default=0)

    def run(self) -> None:
        if self._tiles:
            with torch.cuda.device_of(self._like):
                place_kernel[(len(self._pieces), self._tiles)](
                    self._table, self._scales, self._like, TABLE_FIELDS=FIELDS, HEIGHT=ROWS, WIDTH=COLUMNS, **LAUNCH
                )
