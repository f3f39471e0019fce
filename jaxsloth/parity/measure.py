"""What a rung of the parity ladder yields: measured numbers, each beside the bar that it must meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Measurement:
    """One number. sense "at most": value <= bar passes; "above": value > bar passes (a mutant must miss)."""

    rung: str
    what: str
    value: float
    bar: float
    sense: Literal["at most", "above"] = "at most"
    note: str = ""

    @property
    def passed(self) -> bool:
        """NaN passes nothing."""
        return self.value <= self.bar if self.sense == "at most" else self.value > self.bar


def max_abs(first: np.ndarray, second: np.ndarray) -> float:
    """The largest absolute difference, in float64; arrays of different shapes are an error."""
    if first.shape != second.shape:
        raise ValueError(f"can't compare arrays of shapes {first.shape} and {second.shape}")
    return float(np.max(np.abs(first.astype(np.float64) - second.astype(np.float64)), initial=0.0))


def relative_frobenius(value: np.ndarray, reference: np.ndarray) -> float:
    """``||value - reference|| / ||reference||`` in float64; 0 where both are zero."""
    if value.shape != reference.shape:
        raise ValueError(f"can't compare arrays of shapes {value.shape} and {reference.shape}")
    reference = reference.astype(np.float64)
    distance = float(np.linalg.norm(value.astype(np.float64) - reference))
    size = float(np.linalg.norm(reference))
    return distance / size if size > 0 else distance


def top1_disagreements(logits: np.ndarray, judge: np.ndarray, gap: float) -> int:
    """Rows of ``[rows, vocab]`` whose largest logit is another token than the judge's, where the judge's two largest lie
    further apart than `gap`: closer ones may fall either way by rounding."""
    top2 = np.partition(judge, -2, axis=-1)[:, -2:]
    decided = top2[:, 1] - top2[:, 0] > gap
    return int(np.count_nonzero((logits.argmax(-1) != judge.argmax(-1)) & decided))
