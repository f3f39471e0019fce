"""The 8-bit AdamW step as one Triton kernel: every value is read once and written once, whatever the number of tensors.

One program steps `TILE` blocks of up to 256 values. Where a block lies is read from a table, so that blocks of tensors that are
no multiple of 256 long begin and end with them. With ``m = code[i] * absmax`` and v alike:
``m = beta1·m + (1-beta1)·g``, ``v = beta2·v + (1-beta2)·g²``, ``p = p·decay - step_size·m / (sqrt(v)/root + eps)``; then a
block's new absmax, and each value's code at step ``int((m/absmax + 1)·0.5·65535 + 0.5)`` of the table.
"""

from __future__ import annotations

from functools import cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32

from jaxsloth.kernels.adamw_8bit.contract import BLOCK, Moments, block_edges, check_sizes
from jaxsloth.kernels.nf4.torch_ops import dynamic_code_on, step_lookup_on

TILE = 4
# Each operation is rounded by itself, as on a CPU: a product contracted with a sum may fall on another code.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def store_moment(values, lookup, codes, absmax, place, inside, block, within):
    maximum = tl.max(tl.abs(values), axis=1)
    # A block of zeros has no scale; its codes are 0.
    reciprocal = tl.where(maximum > 0.0, tl.div_rn(1.0, tl.where(maximum > 0.0, maximum, 1.0)), 0.0)
    scaled = tl.minimum(tl.maximum(values * reciprocal[:, None], -1.0), 1.0)
    step = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32)
    code = tl.load(lookup + tl.minimum(tl.maximum(step, 0), 65535))
    tl.store(codes + place, tl.where(maximum[:, None] > 0.0, code, 0).to(tl.uint8), mask=inside)
    tl.store(absmax + block, maximum, mask=within)


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def step_kernel(
    parameter,
    gradient,
    exp_avg,
    exp_avg_absmax,
    exp_avg_sq,
    exp_avg_sq_absmax,
    factors,
    edges,
    code,
    code_sq,
    lookup,
    lookup_sq,
    blocks,
    keep,
    take,
    keep_sq,
    take_sq,
    eps,
    BLOCK_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    within = block < blocks
    start = tl.load(edges + block, mask=within, other=0)
    stop = tl.load(edges + block + 1, mask=within, other=0)
    place = start[:, None] + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = place < stop[:, None]
    decay, step_size, root = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)

    scale = tl.load(exp_avg_absmax + block, mask=within, other=0.0)
    scale_sq = tl.load(exp_avg_sq_absmax + block, mask=within, other=0.0)
    index = tl.load(exp_avg + place, mask=inside, other=0).to(tl.int32)
    index_sq = tl.load(exp_avg_sq + place, mask=inside, other=0).to(tl.int32)
    g = tl.load(gradient + place, mask=inside, other=0.0)
    m = tl.load(code + index) * scale[:, None] * keep + g * take
    v = tl.load(code_sq + index_sq) * scale_sq[:, None] * keep_sq + g * g * take_sq
    # Code 0 of m is no zero: what lies beyond a block must not become its maximum.
    m = tl.where(inside, m, 0.0)

    p = tl.load(parameter + place, mask=inside, other=0.0)
    denominator = tl.div_rn(tl.sqrt_rn(v), root) + eps
    tl.store(parameter + place, p * decay - tl.div_rn(m * step_size, denominator), mask=inside)
    store_moment(m, lookup, exp_avg, exp_avg_absmax, place, inside, block, within)
    store_moment(v, lookup_sq, exp_avg_sq, exp_avg_sq_absmax, place, inside, block, within)


@cache
def _edges(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(block_edges(sizes)).to(device)


@torch.no_grad()
def adamw_8bit(
    parameter: Float32[torch.Tensor, " n"],
    gradient: Float32[torch.Tensor, " n"],
    moments: Moments,
    factors: Float32[torch.Tensor, "3"],
    *,
    sizes: tuple[int, ...],
    betas: tuple[float, float],
    eps: float,
) -> tuple[Float32[torch.Tensor, " n"], Moments]:
    """As torch_ops' function of this name, on CUDA. A layout's table is made at its first call, before a graph is captured."""
    blocks = moments.exp_avg_absmax.numel()
    check_sizes(sizes, parameter.numel(), blocks)
    device = parameter.device
    with torch.cuda.device_of(parameter):
        step_kernel[(triton.cdiv(blocks, TILE),)](
            parameter,
            gradient,
            moments.exp_avg,
            moments.exp_avg_absmax,
            moments.exp_avg_sq,
            moments.exp_avg_sq_absmax,
            factors,
            _edges(sizes, device),
            dynamic_code_on(device, True),
            dynamic_code_on(device, False),
            step_lookup_on(device, True),
            step_lookup_on(device, False),
            blocks,
            betas[0],
            1.0 - betas[0],
            betas[1],
            1.0 - betas[1],
            eps,
            BLOCK_SIZE=BLOCK,
            TILE_BLOCKS=TILE,
            **LAUNCH,
        )
    return parameter, moments
