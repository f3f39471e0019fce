"""The product of two matrices in 8 bits on an NVIDIA GPU, by torch's scaled product (cuBLASLt or CUTLASS)."""

from __future__ import annotations

from functools import cache

import torch

from jaxsloth.kernels.fp8.contract import Rows


@torch.no_grad()
def scaled_product(a: Rows, b: Rows, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Sums stay in the tensor cores' shorter accumulator throughout ("fast accumulation"): what that loses is small beside the
    rounding of the operands."""
    target = out
    if not out.is_contiguous() and not takes_strides(out.device):
        target = torch.empty_like(out, memory_format=torch.contiguous_format)
    # cuBLASLt has no small product of widths that are odd multiples of 16 which adds a bias (H200, CUDA 13.0).
    late, bias = (bias, None) if a.values.shape[1] % 32 else (None, bias)
    torch._scaled_mm(
        a.values,
        b.values.T,
        scale_a=a.scales,
        scale_b=b.scales.T,
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=target,
    )
    if late is not None:
        target += late
    if target is not out:
        out.copy_(target)


@cache
def takes_strides(device: torch.device) -> bool:
    """Whether a result's rows may lie apart. torch goes to cuBLASLt on compute capability 9 with CUDA 12.9 and later, which
    takes them; its CUTLASS product, used elsewhere, forms a transposed result as if they were contiguous."""
    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)
