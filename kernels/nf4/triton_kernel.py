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

TILE = 64
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
    blocks_a_row,
    stride,
    NESTED: tl.constexpr,
    NESTED_SIZE: tl.constexpr,
    STRIDED: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    half: tl.constexpr = BLOCK_SIZE // 2
    tile = tl.program_id(0)
    if WIDE:  # the offset of a value passes 2**31
        tile = tile.to(tl.int64)
    block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    inside = (block < blocks) | WHOLE
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED_SIZE, mask=inside, other=0.0)
        scale = tl.load(nested_code + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    byte_offset = block[:, None] * half + tl.arange(0, half)[None, :]
    byte = tl.load(codes + byte_offset, mask=(byte_offset * 2 < values) | WHOLE, other=0).to(tl.int32)
    high = tl.load(table + (byte >> 4)) * scale[:, None]
    low = tl.load(table + (byte & 15)) * scale[:, None]
    within = tl.arange(0, BLOCK_SIZE)[None, :]
    offset = block[:, None] * BLOCK_SIZE + within
    place = offset
    if STRIDED:
        place = (block // blocks_a_row * stride + block % blocks_a_row * BLOCK_SIZE)[:, None] + within
    tl.store(out + place, tl.interleave(high, low).to(out.dtype.element_ty), mask=(offset < values) | WHOLE)


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(CODE).to(device)


def dequantize(quantized: NF4, dtype: torch.dtype) -> Float[torch.Tensor, "out in"]:
    """The weight ``[out, in]`` of a quantized one, rounded once from float32 to `dtype`; bit-equal with torch_ops."""
    out = torch.empty(quantized.shape, dtype=dtype, device=quantized.codes.device)
    dequantize_into(quantized, out)
    return out


@torch.no_grad()
def dequantize_into(quantized: NF4, out: Float[torch.Tensor, "out in"]) -> None:
    """Writes the weight to `out`, whose rows may lie apart where they are whole blocks.

    Raises:
        ValueError: the rows lie apart and are not a multiple of 64 long.
    """
    codes, absmax, nested = quantized.codes, quantized.absmax, quantized.nested
    blocks = absmax.numel()
    strided = out.stride(0) != out.shape[1]
    if strided and out.shape[1] % BLOCK:
        raise ValueError(f"rows that lie apart must be a multiple of {BLOCK} values long, and these have {out.shape[1]}")
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
            max(out.shape[1] // BLOCK, 1),
            out.stride(0),
            NESTED=nested is not None,
            NESTED_SIZE=NESTED_BLOCK,
            STRIDED=strided,
            WIDE=out.shape[0] * max(out.stride(0), out.shape[1]) >= 2**31,
            WHOLE=blocks % TILE == 0 and out.numel() % BLOCK == 0,
            BLOCK_SIZE=BLOCK,
            TILE_BLOCKS=TILE,
            **LAUNCH,
        )
