"""Matrices in 8 bits in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32

from jaxsloth.kernels.fp8.contract import LARGEST, SMALLEST, AdapterBlock, Rows
from jaxsloth.kernels.nf4 import torch_ops as nf4_torch
from jaxsloth.kernels.nf4.contract import NF4

E4M3 = torch.float8_e4m3fn


def saturate(x: Float32[torch.Tensor, "rows columns"]) -> torch.Tensor:
    """To e4m3; torch's own cast makes NaN of what is over 448."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


@torch.no_grad()
def quantize_rows(
    x: Float[torch.Tensor, "rows width"],
    behind: Float[torch.Tensor, "rows n"] | None = None,
    factor: Float32[torch.Tensor, " 1"] | None = None,
) -> Rows:
    whole = x.float()
    if behind is not None:
        tail = behind.float() if factor is None else behind.float() * factor
        whole = torch.cat([whole, tail], dim=1)
    peak = whole.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST)
    return Rows(saturate(whole * (LARGEST / peak)), peak / LARGEST)


@torch.no_grad()
def scaled_product(a: Rows, b: Rows, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    product = (a.values.float() @ b.values.float().T) * a.scales * b.scales.T
    out.copy_(product if bias is None else product + bias.float())


@torch.no_grad()
def nf4_into(
    quantized: NF4, inverse: Float32[torch.Tensor, " rows"], target: torch.Tensor, *, transposed: bool = False
) -> None:
    dense_into(nf4_torch.dequantize(quantized, torch.float32), inverse, target, transposed=transposed)


@torch.no_grad()
def dense_into(
    weight: Float[torch.Tensor, "out in"],
    inverse: Float32[torch.Tensor, " rows"],
    target: torch.Tensor,
    *,
    transposed: bool = False,
) -> None:
    """`nf4_into` of a weight that is not quantized; done once a run, so nobody has needed a kernel for it."""
    target.copy_(saturate((weight.T if transposed else weight).float() * inverse[:, None]))


class AdapterCopy:
    """See the contract."""

    def __init__(self, pieces: Sequence[AdapterBlock], like: torch.Tensor) -> None:
        del like
        self._pieces = tuple(pieces)

    @torch.no_grad()
    def reach(self, factors: Float32[torch.Tensor, " n"]) -> None:
        """Sets every piece's factor; `factors` is the array that they are elements of."""
        factors.fill_(1.0)
        for piece in self._pieces:
            if piece.source is not None:
                peak = (piece.source * piece.inverse[:, None]).abs().amax() * (abs(piece.scale) / LARGEST)
                piece.factor.copy_(torch.maximum(piece.factor, peak))
        round_up(factors)

    @torch.no_grad()
    def run(self) -> None:
        for piece in self._pieces:
            piece.target.zero_()
            if piece.source is not None:
                values = saturate(piece.source * piece.inverse[:, None] * (piece.scale / piece.factor))
                piece.target[:, piece.first : piece.first + values.shape[1]] = values


def round_up(positive: Float32[torch.Tensor, " n"]) -> None:
    """Powers of two that are not below, in place: a mantissa that is not zero carries into the exponent."""
    positive.view(torch.int32).add_(0x7FFFFF).bitwise_and_(-0x800000)
