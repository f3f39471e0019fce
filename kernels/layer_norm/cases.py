"""The shapes that every layer_norm implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """``x [*lead, hidden]``, normal around `centre` with standard deviation `spread`."""

    name: str
    lead: tuple[int, ...]
    hidden: int
    eps: float = 1e-5
    biased: bool = True
    centre: float = 0.0
    spread: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``layer_norm``."""
        return {"eps": self.eps}


CASES: tuple[Case, ...] = (
    Case("bert", (2, 17), 64, eps=1e-12),
    Case("modernbert", (2, 17), 64, biased=False),
    Case("minilm", (3, 5), 384, eps=1e-12),
    Case("odd_hidden", (4, 9), 77),
    Case("odd_hidden_unbiased", (33,), 129, biased=False),
    Case("one_channel", (6,), 1, eps=0.5),
    Case("single_row", (1,), 128),
    Case("empty", (0, 4), 64),
    Case("heads", (2, 5, 3), 32),
    Case("many_rows", (300,), 16),
    Case("eps_matters", (2, 8), 64, eps=1e-2, spread=0.05),
    Case("off_centre", (2, 8), 96, centre=3.0),
    Case("large_values", (2, 8), 64, spread=100.0),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """float32 ``x [*lead, hidden]``, ``weight [hidden]`` around 1, ``bias [hidden]`` or None, and ``dy`` like x."""
    generator = np.random.default_rng(seed)
    shape = (*case.lead, case.hidden)
    return {
        "x": (case.centre + generator.standard_normal(shape) * case.spread).astype(np.float32),
        "weight": (1.0 + 0.3 * generator.standard_normal(case.hidden)).astype(np.float32),
        "bias": generator.standard_normal(case.hidden).astype(np.float32) if case.biased else None,
        "dy": generator.standard_normal(shape).astype(np.float32),
    }
