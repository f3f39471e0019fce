"""The matrices that every implementation of the 8-bit ops is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Case:
    """Rows ``[rows, width]`` with `behind` columns behind them, times a weight ``[out, width + behind]``."""

    name: str
    rows: int
    width: int
    behind: int = 0
    out: int = 48
    fill: Literal["normal", "zero_rows", "spread"] = "normal"
    factor: float = 1.0
    bias: bool = False


CASES: tuple[Case, ...] = (
    Case("plain", 33, 64),
    Case("behind", 17, 576, 64),
    Case("factor", 16, 128, 64, factor=8.0, bias=True),
    Case("single_row", 1, 48, 16),
    Case("zero_rows", 9, 96, 32, fill="zero_rows"),
    Case("spread", 16, 256, fill="spread"),
    Case("long", 3, 8208, 64, bias=True),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """float32: x ``[rows, width]``, behind ``[rows, behind]`` or None, weight ``[out, width + behind]``, bias ``[out]`` or
    None. "spread" has values from 2^-20 to 1 of their row's maximum."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    x = normal(case.rows, case.width)
    behind = normal(case.rows, case.behind) if case.behind else None
    if case.fill == "zero_rows":
        x[::3] = 0.0
        if behind is not None:
            behind[::3] = 0.0
    elif case.fill == "spread":
        x *= np.exp2(generator.integers(-20, 1, x.shape)).astype(np.float32)
    return {
        "x": x,
        "behind": behind,
        "weight": normal(case.out, case.width + case.behind) * np.float32(0.02),
        "bias": normal(case.out) if case.bias else None,
    }
