"""The batches that every embedding_noise implementation is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsloth.kernels.dropout.contract import module_key


@dataclass(frozen=True)
class Case:
    """Rows of documents of `lengths` tokens each, padded to `length`."""

    name: str
    rows: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    length: int
    channels: int
    alpha: float = 5.0
    step: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``embedding_noise``."""
        return {"alpha": self.alpha}


CASES: tuple[Case, ...] = (
    Case("plain", (0, 1), ((9,), (9,)), 9, 16),
    Case("padded", (0, 1, 2), ((7,), (3,), (1,)), 8, 12, step=7),
    Case("packed", (5, 77), ((3, 4, 1), (6, 2)), 9, 10, alpha=15.0),
    Case("filler_row", (4, -1), ((5,), ()), 6, 8),
    Case("one_element", (1000003,), ((1,),), 1, 1, step=123456),
    Case("all_padding", (-1,), ((),), 4, 8),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray]:
    """``key`` uint32 ``[2]``, ``rows`` int32 ``[batch]``, ``segments`` int32 ``[batch, length]``."""
    segments = np.zeros((len(case.rows), case.length), np.int32)
    for row, lengths in enumerate(case.lengths):
        filled = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segments[row, : len(filled)] = filled
    key = np.array(module_key(seed, case.step, "model.embed_tokens"), np.uint32)
    return {"key": key, "rows": np.array(case.rows, np.int32), "segments": segments}
