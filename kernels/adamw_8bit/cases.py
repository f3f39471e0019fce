"""The states that every adamw_8bit implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxsloth.kernels.adamw_8bit.contract import BLOCK, blocks_of

Fill = Literal["normal", "wide", "zero_gradient", "zero_blocks", "fresh"]


@dataclass(frozen=True)
class Case:
    """Tensors of `sizes` values, one after another, at the update `count` (from 1). fill says what gradient and moments are
    like: wide has eight decades in every block, fresh has seen nothing before."""

    name: str
    sizes: tuple[int, ...]
    fill: Fill = "normal"
    count: int = 7
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


CASES: tuple[Case, ...] = (
    Case("one_tensor", (4096,)),
    Case("adapter", (16 * 576, 576 * 16, 192 * 16, 16 * 1536)),
    Case("alike", (5 * BLOCK,) * 6),
    Case("alike_and_partial", (5 * BLOCK + 9,) * 5),
    Case("partial_blocks", (4096 + 77, 5000, 4999, 256)),
    Case("less_than_a_block", (100, 1, 255, 257)),
    Case("first_step", (4096, 5000), "fresh", count=1),
    Case("late", (4096,), count=100_000),
    Case("no_decay", (4096,), weight_decay=0.0),
    Case("other_betas", (4096,), betas=(0.8, 0.95)),
    Case("no_memory", (4096,), betas=(0.0, 0.0)),
    Case("large_eps", (4096,), eps=1e-2),
    Case("large_rate", (4096,), learning_rate=1.0, weight_decay=0.5),
    Case("wide", (4096, 300), "wide"),
    Case("zero_gradient", (4096,), "zero_gradient"),
    Case("zero_blocks", (4096, 700), "zero_blocks"),
    Case("many_blocks", (300_000, 70_001)),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray]:
    """``parameter`` and ``gradient`` float32 ``[n]``, and the fields of a `Moments`."""
    generator = np.random.default_rng(seed)
    size, blocks = sum(case.sizes), sum(blocks_of(size) for size in case.sizes)
    gradient = generator.standard_normal(size) * 0.01
    exp_avg, exp_avg_sq = (generator.integers(0, 256, size).astype(np.uint8) for _ in range(2))
    absmax = generator.uniform(1e-3, 1e-2, blocks)
    if case.fill == "wide":
        gradient *= 10.0 ** generator.uniform(-8, 0, size)
    elif case.fill == "zero_gradient":
        gradient[:] = 0.0
    elif case.fill == "zero_blocks":
        gradient[: size // 2] = 0.0
        absmax[: blocks // 2] = 0.0
    elif case.fill == "fresh":
        exp_avg, exp_avg_sq, absmax = np.zeros_like(exp_avg), np.zeros_like(exp_avg_sq), np.zeros_like(absmax)
    return {
        "parameter": (generator.standard_normal(size) * 0.1).astype(np.float32),
        "gradient": gradient.astype(np.float32),
        "exp_avg": exp_avg,
        "exp_avg_absmax": absmax.astype(np.float32),
        "exp_avg_sq": exp_avg_sq,
        "exp_avg_sq_absmax": (absmax**2).astype(np.float32),
    }
