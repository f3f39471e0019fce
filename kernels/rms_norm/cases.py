"""The shapes that every rms_norm implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """``x [*lead, hidden]``, normal with standard deviation `spread`."""

    name: str
    lead: tuple[int, ...]
    hidden: int
    eps: float = 1e-5
    offset: float = 0.0
    spread: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``rms_norm``."""
        return {"eps": self.eps, "offset": self.offset}


CASES: tuple[Case, ...] = (
    Case("llama", (2, 17), 64),
    Case("gemma", (2, 17), 64, eps=1e-6, offset=1.0),
    Case("smollm2", (3, 5), 576),
    Case("odd_hidden", (4, 9), 77),
    Case("gemma_odd_hidden", (33,), 129, offset=1.0),
    # With one channel and a small eps dx is the difference of equal numbers, which no float32 formula can hold.
    Case("one_channel", (6,), 1, eps=0.5),
    Case("single_row", (1,), 128),
    Case("empty", (0, 4), 64),
    Case("heads", (2, 5, 3), 32),
    Case("many_rows", (300,), 16),
    Case("eps_matters", (2, 8), 64, eps=1e-2, spread=0.05),
    Case("large_values", (2, 8), 64, spread=100.0),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """float32 ``x [*lead, hidden]``, ``weight [hidden]`` (around 1, less the offset) and ``dy`` like x."""
    generator = np.random.default_rng(seed)
    shape = (*case.lead, case.hidden)
    return {
        "x": (generator.standard_normal(shape) * case.spread).astype(np.float32),
        "weight": (1.0 - case.offset + 0.3 * generator.standard_normal(case.hidden)).astype(np.float32),
        "dy": generator.standard_normal(shape).astype(np.float32),
    }
