"""Adapted linear layers that share their input, as one matrix: ``[[W, sB], [A, 0]]``.

Stack the layers' weights to ``W [out, in]``, their A to ``[rank, in]`` and lay their scaled B out block by block in
``[out, rank]``. With the rows of x followed by ``x·Aᵀ`` and those of dy by ``dy·sB``, both directions are one product each:

    y  = [x, x·Aᵀ] · [W, sB]ᵀ          dx = [dy, dy·sB] · [W; A]

The adapter rides along as a few more columns of the product, accumulated in float32 with it, instead of reading and writing y
once more. rank is filled up with zeros to a multiple of `PAD`, which keeps the products on their fast paths (measured,
docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jaxsloth.kernels.nf4 import torch_ops as nf4_torch


@dataclass(frozen=True)
class AdapterBlock:
    """``target[:, first : first + source.shape[1]] = scale·source``, the target's other columns zero.

    source float32 ``[rows, n]`` or None (all zero); target ``[rows, columns]`` of any row stride.
    """

    source: torch.Tensor | None
    target: torch.Tensor
    first: int = 0
    scale: float = 1.0


class AdapterCopy:
    """Pieces whose memory stays; `run` writes them all."""

    def __init__(self, pieces: Sequence[AdapterBlock], like: torch.Tensor) -> None:
        del like
        self._pieces = tuple(pieces)

    @torch.no_grad()
    def run(self) -> None:
        for piece in self._pieces:
            piece.target.zero_()
            if piece.source is not None:
                piece.target[:, piece.first : piece.first + piece.source.shape[1]] = piece.scale * piece.source


def dequantize_into(quantized: Any, out: torch.Tensor) -> None:
    """The dequantized weight in rows that may lie apart."""
    out.copy_(nf4_torch.dequantize(quantized, out.dtype))
