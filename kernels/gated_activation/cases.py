"""The shapes that every gated_activation implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsloth.kernels.gated_activation.contract import KINDS


@dataclass(frozen=True)
class Case:
    """gate and up ``[*lead, width]``; gate is normal with standard deviation `spread`."""

    name: str
    lead: tuple[int, ...]
    width: int
    kind: str = "silu"
    spread: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``gated_activation``."""
        return {"kind": self.kind}


CASES: tuple[Case, ...] = (
    *(Case(kind, (2, 16), 96, kind) for kind in KINDS),
    *(Case(f"{kind}_saturated", (3, 7), 50, kind, spread=15.0) for kind in KINDS),
    Case("one_element", (1,), 1),
    Case("odd_width", (2, 3), 77, "gelu_tanh"),
    Case("single_row", (1,), 1536),
    Case("empty", (0, 4), 64),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """float32 ``gate``, ``up`` and ``dy``, each ``[*lead, width]``."""
    generator = np.random.default_rng(seed)
    shape = (*case.lead, case.width)
    return {
        "gate": (generator.standard_normal(shape) * case.spread).astype(np.float32),
        "up": generator.standard_normal(shape).astype(np.float32),
        "dy": generator.standard_normal(shape).astype(np.float32),
    }
