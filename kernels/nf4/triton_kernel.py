"""NF4 dequantization as one Triton kernel: codes and both levels of scales in, the weight out, nothing between.

One program writes `TILE` blocks of 64 values: ``out[b, 2j] = CODE[byte >> 4] * s[b]`` and ``out[b, 2j + 1] =
CODE[byte & 15] * s[b]`` with ``s[b]`` the block's float32 absmax, which in the nested format is itself
``code[absmax_codes[b]] * absmax[b // 256] + offset``, two roundings (contraction is switched off at the launch).
"""

from __future__ import annotations

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float

from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4

TILE = 32
# CODE times a scale must be rounded as bitsandbytes rounds it, and so must code * absmax before the offset is added.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def dequantize_kernel(
    codes,
    absmax,
    table,
    nested_absmax,
    nested_code,
    nested_offset,
    out,
    values,
    blocks,
    NESTED: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    half: tl.constexpr = BLOCK_SIZE // 2
    # int64: the offset of a value passes 2**31 in a large embedding.
    block = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    inside = block < blocks
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED_SIZE, mask=inside, other=0.0)
        scale = tl.load(nested_code + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    byte_offset = block[:, None] * half + tl.arange(0, half)[None, :]
    byte = tl.load(codes + byte_offset, mask=byte_offset * 2 < values, other=0).to(tl.int32)
    high = tl.load(table + (byte >> 4)) * scale[:, None]
    low = tl.load(table + (byte & 15)) * scale[:, None]
    offset = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + offset, tl.interleave(high, low).to(out.dtype.element_ty), mask=offset < values)


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(CODE).to(device)


@torch.no_grad()
def dequantize(quantized: NF4, dtype: torch.dtype) -> Float[torch.Tensor, "out in"]:
    """The weight ``[out, in]`` of a quantized one, rounded once from float32 to `dtype`; bit-equal with torch_ops."""
    codes, absmax, nested = quantized.codes, quantized.absmax, quantized.nested
    out = torch.empty(quantized.shape, dtype=dtype, device=codes.device)
    blocks = absmax.numel()
    # Without a second level its pointers are never read; any will do.
    second = (absmax, absmax, absmax) if nested is None else (nested.absmax, nested.code, nested.offset)
    with torch.cuda.device_of(codes):
        dequantize_kernel[(triton.cdiv(blocks, TILE),)](
            codes,
            absmax,
            _table(codes.device),
            *second,
            out,
            out.numel(),
            blocks,
            NESTED=nested is not None,
            NESTED_SIZE=NESTED_BLOCK,
            BLOCK_SIZE=BLOCK,
            TILE_BLOCKS=TILE,
            **LAUNCH,
        )
    return out
