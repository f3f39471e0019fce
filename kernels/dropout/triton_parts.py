"""What the Triton kernels that draw share of Philox."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def wide_product(word, FACTOR: tl.constexpr):
    """(upper, lower) 32 bits."""
    product = word.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)
