"""NF4: the 4-bit NormalFloat weight format of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, §3), as bitsandbytes stores it.

A weight ``[out, in]`` is flattened row-major and cut in blocks of 64. A block is stored as its absolute maximum
(float32) and one 4-bit index a value into `CODE`, the high nibble first. Nested ("double") quantization stores the
float32 maxima themselves in 8 bits: their mean is subtracted (`offset`), and blocks of 256 are scaled by their own
maximum and matched to the nearest of 256 values of the dynamic code.

Functions, the same in ``torch_ops`` and ``xla_ops`` (arrays are the framework's):

``quantize(weight, *, nested=False, offset=None) -> NF4``
    weight ``[out, in]``, any float dtype (read as float32). `offset` (float32 scalar) replaces the mean of the maxima:
    float32 means differ by summation order, and tests need one that is given.
``dequantize(quantized, dtype, *, layer=None) -> [out, in]``
    the product ``CODE[index] * absmax`` in float32, rounded once to dtype. With `layer` (an int32 scalar, JAX only) the
    arrays carry a leading ``[layers]`` axis and the one layer is read in place.

``matvec(x, weights, bias=None) -> [rows, sum of out]``
    x ``[rows, in]`` (rows of any stride) in float32, bfloat16 or float16, which is also the result's; weights: a sequence of
    NF4 that share their ``in``. ``y = [x·W0ᵀ, x·W1ᵀ, …]``, the dequantized weight in float32 or rounded to x's dtype, products
    accumulated in float32, y rounded once. For few rows (decoding): codes and maxima are read once and no weight is written.
    No gradient. On JAX there is no bias, and `layer` is as above, for all weights. Held to `MATVEC_TOLERANCES`.

Details that bit-equality with bitsandbytes 0.50 (its CPU library is the judge) needs, the same in every implementation:
- A value is multiplied by ``1 / max(absmax, 1e-38)``, clipped to [-1, 1] and matched to the nearest of `CODE`, the lower one
  at the float32 midpoint. The last block, where it is shorter than 64, is divided by absmax instead, and its absmax is
  itself at least 1e-38. The second half of a last byte that has no value of its own holds 7, the index of zero.
- A maximum less offset is multiplied by ``1 / nested.absmax``, clipped, snapped to 65536 steps and looked up in
  `step_lookup()`: index ``int((v + 1) * 0.5 * 65535 + 0.5)`` in float32. (bitsandbytes on CUDA takes the exactly nearest
  code instead; about one code in a thousand, near a midpoint, is the neighbour there.) A block whose nested.absmax is 0
  gets code 0.

Exactness: quantize and dequantize are bit-equal to bitsandbytes', except for the offset's own summation order.
Mind FMA: ``code * scale + offset`` contracted into one rounding differs in the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsloth.kernels.registry import Implementation, Op, Target, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance

BLOCK = 64
NESTED_BLOCK = 256

# bitsandbytes functional.get_4bit_type("nf4"): quantiles of N(0, 1), normalised to [-1, 1], with an exact zero.
CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


def _float32_edges(count: int) -> np.ndarray:
    """`count + 1` values from 0.1 to 1 as bitsandbytes' ``torch.linspace`` rounds them on a CPU with FMA.

    The lower half counts up from 0.1 and the upper half down from 1, each ``end ± step * i`` with one rounding.
    """
    low, high = np.float32(0.1), np.float32(1.0)
    step = np.float64((high - low) / np.float32(count))
    index = np.arange(count + 1)
    up, down = np.float64(low) + step * index, np.float64(high) - step * (count - index)
    return np.where(index < (count + 1) // 2, up, down).astype(np.float32)


def dynamic_code(*, signed: bool = True) -> np.ndarray:
    """The 256 values of bitsandbytes' dynamic 8-bit type (Dettmers 2021, arXiv:2110.02861, §2.1), ascending, float32.

    Every value is the product of two float32 numbers, a power of ten and the middle of two edges, rounded to float32. Without
    a sign, each power of ten has twice as many magnitudes.
    """
    values = [np.array([0.0, 1.0], np.float32)]
    for exponent in range(7):
        edges = _float32_edges(2 ** (exponent if signed else exponent + 1))
        magnitudes = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [magnitudes, -magnitudes] if signed else [magnitudes]
    return np.sort(np.concatenate(values))


def step_lookup(*, signed: bool = True) -> np.ndarray:
    """uint8 ``[65536]``: the dynamic code nearest to step i of 65536 from -1 to 1, the lower one at a midpoint; in float32."""
    code = dynamic_code(signed=signed)
    midpoints = (code[:-1] + code[1:]) / np.float32(2)
    steps = np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535) - np.float32(1)
    return np.searchsorted(midpoints, steps).astype(np.uint8)


@dataclass(frozen=True)
class Nested:
    """The second level: ``absmax[block] = code[absmax_codes[block]] * absmax[block // 256] + offset``."""

    absmax: Any  # float32 [..., ceil(blocks / 256)]
    offset: Any  # float32 [...]
    code: Any  # float32 [256], the dynamic code


@dataclass(frozen=True)
class NF4:
    """A quantized weight. On JAX the arrays may carry a leading ``[layers]`` axis (all but ``nested.code``)."""

    codes: Any  # uint8 [..., ceil(out * in / 2)], two indices a byte, the earlier value in the high nibble
    absmax: Any  # float32 [..., blocks]; uint8 codes of it [..., blocks] when nested
    nested: Nested | None
    shape: tuple[int, int]  # (out, in)


QUANTIZE = Op(
    "nf4_quantize",
    (
        Implementation("torch", "torch", "jaxsloth.kernels.nf4.torch_ops:quantize"),
        Implementation("xla", "jax", "jaxsloth.kernels.nf4.xla_ops:quantize"),
    ),
)
DEQUANTIZE = Op(
    "nf4_dequantize",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.nf4.triton_kernel:dequantize", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.nf4.torch_ops:dequantize"),
        Implementation("pallas", "jax", "jaxsloth.kernels.nf4.pallas_kernel:dequantize", needs_cuda),
        Implementation("xla", "jax", "jaxsloth.kernels.nf4.xla_ops:dequantize"),
    ),
)


# Rows of x that the kernels take: one tile of the tensor cores.
MATVEC_ROWS = 16


def _matvec_refuses(target: Target) -> str | None:
    """sizes: rows, in, values (of the largest weight); what is not told is taken to fit."""
    rows, in_, values = (target.sizes.get(name, 0) for name in ("rows", "in", "values"))
    if rows > MATVEC_ROWS:
        return f"takes at most {MATVEC_ROWS} rows, and there are {rows}"
    if in_ % BLOCK:
        return f"needs rows of whole blocks of {BLOCK} values, and in={in_}"
    if values >= 2**31:
        return f"counts values in 32 bits, and a weight has {values}"
    return needs_cuda(target)


MATVEC = Op(
    "nf4_matvec",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.nf4.matvec_triton:matvec", _matvec_refuses),
        Implementation("torch", "torch", "jaxsloth.kernels.nf4.torch_ops:matvec"),
        Implementation("pallas", "jax", "jaxsloth.kernels.nf4.pallas_matvec:matvec", _matvec_refuses),
        Implementation("xla", "jax", "jaxsloth.kernels.nf4.xla_ops:matvec"),
    ),
)
OPS = (QUANTIZE, DEQUANTIZE, MATVEC)
# float32: a sum of 4096 products rounded one by one walks sqrt(4096)·2^-24 away; measured on an H200: 2.05e-6.
MATVEC_TOLERANCES = {
    "float32": Tolerance(output=4e-6, gradient=0.0),
    "bfloat16": Tolerance(output=8e-3, gradient=0.0),
    "float16": Tolerance(output=1e-3, gradient=0.0),
}
