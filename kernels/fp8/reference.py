"""What matrices in 8 bits mean, in float64: what a `Rows` stands for, and the nearest e4m3 value by its definition."""

from __future__ import annotations

import torch
from jaxtyping import Float64

from jaxsloth.kernels.fp8.contract import LARGEST, SMALLEST, Rows


def e4m3(x: torch.Tensor) -> Float64[torch.Tensor, "..."]:
    """The nearest multiple of 2^(e-3) where 2^e ≤ |x|, e at least -6, ties to the even one; saturated at 448."""
    x = x.double()
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-6)))
    step = torch.exp2(exponent - 3)
    return (torch.round(x / step) * step).clamp(-LARGEST, LARGEST)


def meant(rows: Rows) -> Float64[torch.Tensor, "rows columns"]:
    return rows.values.double() * rows.scales.double()


def quantize_rows(
    x: torch.Tensor, behind: torch.Tensor | None = None, factor: float = 1.0
) -> tuple[Float64[torch.Tensor, "rows columns"], Float64[torch.Tensor, "rows 1"]]:
    """(values, scales)."""
    whole = x.double() if behind is None else torch.cat([x.double(), factor * behind.double()], dim=1)
    scales = whole.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return e4m3(whole / scales), scales


def scaled_product(a: Rows, b: Rows, bias: torch.Tensor | None) -> Float64[torch.Tensor, "m n"]:
    product = meant(a) @ meant(b).T
    return product if bias is None else product + bias.double()
