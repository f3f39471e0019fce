"""The masks that every keep_mask implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsloth.kernels.dropout.contract import module_key


@dataclass(frozen=True)
class Case:
    """A mask ``[len(rows), length, channels]`` of one module in one step."""

    name: str
    rows: tuple[int, ...]
    length: int
    channels: int
    rate: float = 0.1
    step: int = 0
    module: str = "model.layers.0.self_attn.q_proj"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``keep_mask``."""
        return {"rate": self.rate}


CASES: tuple[Case, ...] = (
    Case("plain", (0, 1, 2), 16, 64),
    Case("half", (0, 1), 9, 65, rate=0.5, step=7),
    Case("rate_zero", (0,), 5, 16, rate=0.0),
    Case("nearly_one", (3,), 8, 100, rate=0.99),
    Case("one_element", (5,), 1, 1, rate=0.5),
    Case("scattered_rows", (1000003, 4, 77), 7, 33, rate=0.25, step=123456),
    Case("other_module", (0, 1, 2), 16, 64, module="model.layers.11.mlp.down_proj"),
    Case("empty", (), 4, 8),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """``key`` uint32 ``[2]`` (of `seed`, the case's step and module) and ``rows`` int32 ``[batch]``."""
    return {
        "key": np.array(module_key(seed, case.step, case.module), np.uint32),
        "rows": np.array(case.rows, np.int32),
    }
