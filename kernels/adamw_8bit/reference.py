"""The 8-bit AdamW step by its formula, in float64, a tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Int64, UInt8

from jaxsloth.kernels.adamw_8bit.contract import BLOCK
from jaxsloth.kernels.nf4.contract import dynamic_code


@dataclass(frozen=True)
class Stored:
    """Where a moment's codes may lie: rounding decides between `lowest` and `highest`, mostly equal."""

    absmax: torch.Tensor  # float64 [blocks]
    lowest: torch.Tensor  # int64 [n]
    highest: torch.Tensor  # int64 [n]


def dequantize(
    codes: UInt8[torch.Tensor, " n"], absmax: Float32[torch.Tensor, " blocks"], signed: bool
) -> Float64[torch.Tensor, " n"]:
    """One tensor's moment."""
    values = torch.from_numpy(dynamic_code(signed=signed)).double()[codes.long()]
    return values * absmax.double()[torch.arange(len(codes)) // BLOCK]


def adamw(
    parameter: Float64[torch.Tensor, " n"],
    gradient: Float64[torch.Tensor, " n"],
    exp_avg: Float64[torch.Tensor, " n"],
    exp_avg_sq: Float64[torch.Tensor, " n"],
    *,
    learning_rate: float,
    count: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Float64[torch.Tensor, " n"], Float64[torch.Tensor, " n"], Float64[torch.Tensor, " n"]]:
    """(parameter, exp_avg, exp_avg_sq) after Loshchilov & Hutter 2019, alg. 2, with a constant schedule multiplier."""
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
    corrected, corrected_sq = exp_avg / (1 - beta1**count), exp_avg_sq / (1 - beta2**count)
    parameter = parameter - learning_rate * (corrected / (corrected_sq.sqrt() + eps) + weight_decay * parameter)
    return parameter, exp_avg, exp_avg_sq


def store(values: Float64[torch.Tensor, " n"], signed: bool, steps: float) -> Stored:
    """How one tensor's moment is kept, where float32 may shift a value by `steps` of the 65536 steps from -1 to 1."""
    code = torch.from_numpy(dynamic_code(signed=signed)).double()
    midpoints = (code[:-1] + code[1:]) / 2
    absmax = torch.stack([block.abs().max() for block in values.split(BLOCK)])
    each = absmax[torch.arange(len(values)) // BLOCK]
    place = (torch.where(each > 0, values / each, torch.zeros_like(values)) + 1) / 2 * 65535

    def nearest(shift: float) -> Int64[torch.Tensor, " n"]:
        step = torch.floor(place + 0.5 + shift).clamp(0, 65535)
        # A step on a midpoint: float32 midpoints and steps are themselves rounded.
        found = torch.searchsorted(midpoints, step * 2 / 65535 - 1 + (1e-7 if shift > 0 else -1e-7))
        return torch.where(each > 0, found, torch.zeros_like(found))

    return Stored(absmax, nearest(-steps), nearest(steps))
