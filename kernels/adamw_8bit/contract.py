"""One AdamW step on moments kept in 8 bits (Dettmers et al. 2022, arXiv:2110.02861, §2), as bitsandbytes' ``AdamW8bit`` does.

``adamw_8bit(parameter, gradient, moments, factors, *, sizes, betas, eps) -> (parameter, moments)``
    parameter and gradient float32 ``[n]`` hold tensors of ``sizes`` values one after another; blocks of 256 begin anew in every
    tensor, so that the numbers are those of each tensor by itself. moments is a `Moments`; factors float32 ``[3]`` is
    `step_factors` on the device, so that neither a rate nor a count is compiled in. On torch the arrays are updated in place
    and returned; on JAX new ones are returned.

With ``m = code[exp_avg] * absmax`` and ``v`` alike (the signed and the unsigned dynamic code of `kernels/nf4/contract.py`):
``m = beta1·m + (1-beta1)·g``, ``v = beta2·v + (1-beta2)·g²``,
``p = p·(1 - rate·weight_decay) - rate/(1-beta1^t) · m / (sqrt(v)/sqrt(1-beta2^t) + eps)``; then m and v are stored again, each
block by its own absolute maximum. The parameter sees m and v before they are rounded to 8 bits.

What is followed to the bit is bitsandbytes 0.50's CPU code, which is the judge. A value times ``1 / absmax`` is snapped to one
of 65536 steps of [-1, 1] and looked up: v below 1.5e-5 of its block's maximum is stored as about 1.5e-5 of it, never as zero.
Its CUDA code differs in three ways, none of which is a tie: it takes the exactly nearest code, keeps m's sign when rounding,
and decays the parameter after the update instead of before (a factor of ``1 - rate·weight_decay`` on the update).
A gradient that is not finite spoils its block (bitsandbytes passes over such values): the loop stops at the loss behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from jaxsloth.kernels.registry import Implementation, Op, Target, needs_cuda

BLOCK = 256
SMALLEST = 4096  # tensors with fewer values keep float32 moments, as bitsandbytes' min_8bit_size has it


@dataclass(frozen=True)
class Moments:
    """Adam's two moments of n values in 8 bits; all zeros where nothing has been seen."""

    exp_avg: Any  # uint8 [n], indices into the signed dynamic code
    exp_avg_absmax: Any  # float32 [blocks]
    exp_avg_sq: Any  # uint8 [n], indices into the unsigned dynamic code
    exp_avg_sq_absmax: Any  # float32 [blocks]


def step_factors(
    learning_rate: float, count: int, betas: tuple[float, float], weight_decay: float
) -> tuple[float, float, float]:
    """(1 - rate·decay, rate / (1 - beta1^count), sqrt(1 - beta2^count)): all of a step that changes from one to the next. count
    is of updates, this one included."""
    beta1, beta2 = betas
    return 1.0 - learning_rate * weight_decay, learning_rate / (1.0 - beta1**count), math.sqrt(1.0 - beta2**count)


def blocks_of(size: int) -> int:
    return -(-size // BLOCK)


def runs(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, how many tensors in a row have it), in order."""
    return [(size, len(list(group))) for size, group in groupby(sizes)]


def block_edges(sizes: tuple[int, ...]) -> np.ndarray:
    """int64 ``[blocks + 1]``: where each block begins, and the end of the last."""
    starts = [np.arange(0, size, BLOCK) + offset for size, offset in zip(sizes, np.cumsum((0, *sizes)).tolist(), strict=False)]
    return np.concatenate([*starts, [sum(sizes)]]).astype(np.int64)


def check_sizes(sizes: tuple[int, ...], values: int, blocks: int) -> None:
    """ValueError unless tensors of `sizes` make up `values` values in `blocks` blocks."""
    expected = sum(sizes), sum(blocks_of(size) for size in sizes)
    if min(sizes, default=0) < 1 or expected != (values, blocks):
        raise ValueError(
            f"sizes must be positive and make up the parameter; {sizes} mean {expected[0]} values in {expected[1]} blocks, and "
            f"the parameter has {values} and the moments {blocks}"
        )


def check_stored(state: Mapping[str, np.ndarray], *, eight_bit: bool) -> None:
    """ValueError unless the moments of a checkpoint (``{name}.exp_avg`` and ``.exp_avg_sq``) are stored as this optimizer's."""
    for name, value in state.items():
        if not name.endswith((".exp_avg", ".exp_avg_sq")):
            continue
        expected = "uint8" if eight_bit and value.size >= SMALLEST else "float32"
        if value.dtype.name != expected:
            optimizer = "adamw_8bit" if eight_bit else "adamw"
            raise ValueError(
                f"the optimizer {optimizer} keeps {name} as {expected}, got {value.dtype.name}; "
                "go on with the optimizer that wrote the checkpoint (optimizer.name)"
            )


def _pallas_refuses(target: Target) -> str | None:
    if target.sizes.get("values", 0) >= 2**31:
        return f"counts values in int32, and there are {target.sizes['values']}"
    return needs_cuda(target)


ADAMW_8BIT = Op(
    "adamw_8bit",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.adamw_8bit.triton_kernel:adamw_8bit", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.adamw_8bit.torch_ops:adamw_8bit"),
        Implementation("pallas", "jax", "jaxsloth.kernels.adamw_8bit.pallas_kernel:adamw_8bit", _pallas_refuses),
        Implementation("xla", "jax", "jaxsloth.kernels.adamw_8bit.xla_ops:adamw_8bit"),
    ),
)
OPS = (ADAMW_8BIT,)

# Bars against the reference, from the same stored state. A parameter may be off by ULPS of its own spacing and UPDATE of its
# step, a maximum by ABSMAX of itself; a code must be one of those that lie within STEPS of a step of the exact value.
ULPS, UPDATE, ABSMAX, STEPS = 2.0, 1e-6, 1e-6, 0.05
