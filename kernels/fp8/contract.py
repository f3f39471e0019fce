"""Matrices in 8 bits with one float32 scale a row, and their products: e4m3 (Micikevicius et al. 2022, arXiv:2209.05433).

A `Rows` stands for ``values * scales``. e4m3 has 3 bits of mantissa and reaches from 2^-9 to 448, so a value keeps its
relative precision (half a unit is 2^-4 of it) down to 2^-15 of what its row's scale maps to 448.

Functions, the same in ``torch_ops`` and on the device (arrays are the framework's):

``quantize_rows(x, behind=None, factor=None) -> Rows``
    x ``[rows, width]`` and behind ``[rows, n]`` or None, in one float dtype and with rows of any stride; factor float32
    ``[1]``, or None for 1. Row r stands for ``[x_r, factor·behind_r]``: values float8_e4m3fn ``[rows, width + n]``,
    contiguous; scales float32 ``[rows, 1]``, ``max|row| / 448`` and at least `SMALLEST` / 448. A value is multiplied by
    ``448 / max|row|`` in float32 and rounded to nearest even. NaN and infinity make NaN.
``scaled_product(a, b, bias, out)``
    out ``[m, n]``, of any row stride, ``= (a.values·a.scales) · (b.values·b.scales)ᵀ + bias`` for Rows ``[m, k]`` and
    ``[n, k]`` (k and n multiples of 16) and bias ``[n]`` in out's dtype or None; products accumulate in float32.
``nf4_into(quantized, inverse, target, *, transposed=False)``
    target float8_e4m3fn, rows of any stride, ``= dequantized weight * inverse`` saturated; inverse float32 a row of target.
    target is ``[out, in]``, or with transposed ``[in, out]``. in is a multiple of 64.
``AdapterCopy(pieces, like)``
    The adapters' part of such matrices, see `AdapterBlock`: ``reach(factors)`` and ``run()``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxsloth.kernels.registry import Implementation, Op, needs_cuda

LARGEST = 448.0  # of e4m3
SMALLEST = 1e-12  # a row's maximum is taken to be at least this
WIDTH = 16  # the tensor cores' products take matrices whose widths are multiples of this many bytes


@dataclass(frozen=True)
class Rows:
    values: Any  # float8_e4m3fn [rows, columns], contiguous
    scales: Any  # float32 [rows, 1]


@dataclass(frozen=True)
class AdapterBlock:
    """``target[:, first : first + n] = scale / factor · source * inverse`` a row, saturated; the target's other columns zero.

    source float32 ``[rows, n]`` of any strides, or None (all zero); target float8_e4m3fn ``[rows, columns]`` of any row
    stride; inverse float32 ``[rows]``, the reciprocals of the target's row scales; factor float32 ``[1]``, a power of two of
    at least 1, which `AdapterCopy.reach` raises until no value saturates.
    """

    source: Any
    target: Any
    inverse: Any
    factor: Any
    first: int = 0
    scale: float = 1.0


QUANTIZE_ROWS = Op(
    "fp8_quantize_rows",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.fp8.triton_kernel:quantize_rows", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.fp8.torch_ops:quantize_rows"),
    ),
)
NF4_INTO = Op(
    "fp8_nf4_into",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.fp8.triton_kernel:nf4_into", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.fp8.torch_ops:nf4_into"),
    ),
)
SCALED_PRODUCT = Op(
    "fp8_scaled_product",
    (
        Implementation("library", "torch", "jaxsloth.kernels.fp8.library_ops:scaled_product", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.fp8.torch_ops:scaled_product"),
    ),
)
OPS = (QUANTIZE_ROWS, NF4_INTO, SCALED_PRODUCT)

# Relative Frobenius bars. A value quantized and back, of normally distributed rows; a product of two such matrices beside that
# of what they stand for, which is rounding of sums and of the result (bfloat16), and on tensor cores a shorter accumulator.
ROUNDING = 4e-2
PRODUCT = 4e-3
