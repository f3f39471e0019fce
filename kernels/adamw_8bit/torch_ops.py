"""The 8-bit AdamW step in plain torch, some whole blocks at a time: on a CPU every bit is bitsandbytes'."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float32

from jaxsloth.kernels.adamw_8bit.contract import BLOCK, Moments, blocks_of, check_sizes
from jaxsloth.kernels.nf4.torch_ops import dynamic_code_on, quantize_dynamic

SLICE = 2**20  # values stepped at once: few calls, and temporaries that stay small


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
    """Updates parameter and moments in place and returns them; see the contract.

    Raises:
        ValueError: sizes do not make up the parameter.
    """
    check_sizes(sizes, parameter.numel(), moments.exp_avg_absmax.numel())
    for own, scales in _slices(sizes):
        one = Moments(
            moments.exp_avg[own], moments.exp_avg_absmax[scales], moments.exp_avg_sq[own], moments.exp_avg_sq_absmax[scales]
        )
        _update(parameter[own], gradient[own], one, factors, betas, eps)
    return parameter, moments


def _slices(sizes: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """(values, their blocks), in order. Tensors of whole blocks are stepped with what follows them: no block is shared."""
    begin = value = block = 0
    for index, size in enumerate(sizes):
        value += size
        if (value - begin) % BLOCK == 0 and index + 1 < len(sizes):
            continue
        for start in range(begin, value, SLICE):
            stop = min(start + SLICE, value)
            count = blocks_of(stop - start)
            yield slice(start, stop), slice(block, block + count)
            block += count
        begin = value


def _update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    moments: Moments,
    factors: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    decay, step_size, root = factors.unbind()
    exp_avg = _dequantize(moments.exp_avg, moments.exp_avg_absmax, True)
    exp_avg_sq = _dequantize(moments.exp_avg_sq, moments.exp_avg_sq_absmax, False)
    exp_avg.mul_(betas[0]).add_(gradient, alpha=1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1.0 - betas[1])
    denominator = (exp_avg_sq.sqrt() / root).add_(eps)
    parameter.mul_(decay).sub_((exp_avg * step_size).div_(denominator))
    for values, codes, absmax, signed in (
        (exp_avg, moments.exp_avg, moments.exp_avg_absmax, True),
        (exp_avg_sq, moments.exp_avg_sq, moments.exp_avg_sq_absmax, False),
    ):
        found, maxima = quantize_dynamic(values, signed)
        codes.copy_(found)
        absmax.copy_(maxima)


def _dequantize(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    scales = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return dynamic_code_on(codes.device, signed).index_select(0, codes.int()).mul_(scales)
