"""The shapes that every linear_cross_entropy implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Case:
    """hidden ``[tokens, width]`` against ``vocab`` words; logits have a standard deviation of about `spread`."""

    name: str
    tokens: int
    width: int
    vocab: int
    chunk: int | None = None
    soft_cap: float | None = None
    ignored: Literal["none", "some", "all"] = "some"
    ignore_index: int = -100
    spread: float = 2.0
    per_token: bool = False
    label_smoothing: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``linear_cross_entropy``."""
        return {
            "soft_cap": self.soft_cap,
            "ignore_index": self.ignore_index,
            "chunk": self.chunk,
            "per_token": self.per_token,
            "label_smoothing": self.label_smoothing,
        }


CASES: tuple[Case, ...] = (
    Case("chosen_chunk", 40, 32, 101),
    Case("one_chunk", 24, 32, 64, chunk=24, ignored="none"),
    Case("even_chunks", 24, 32, 64, chunk=8),
    Case("partial_chunk", 29, 48, 97, chunk=8),
    Case("chunk_over_tokens", 5, 16, 33, chunk=64),
    Case("chunk_of_one", 6, 16, 33, chunk=1),
    Case("single_token", 1, 32, 50, ignored="none"),
    Case("empty", 0, 32, 50, ignored="none"),
    Case("all_ignored", 9, 16, 33, chunk=4, ignored="all"),
    Case("soft_cap", 21, 32, 90, chunk=8, soft_cap=3.0),
    Case("ignore_zero", 17, 32, 40, chunk=5, ignore_index=0),
    Case("peaked", 16, 32, 60, chunk=7, spread=20.0),
    Case("wide_vocab", 12, 16, 4099, chunk=5),
    Case("tokens", 40, 32, 101, per_token=True),
    Case("tokens_partial_chunk", 29, 48, 97, chunk=8, per_token=True),
    Case("tokens_soft_cap", 21, 32, 90, chunk=8, soft_cap=3.0, per_token=True),
    Case("smoothed", 29, 48, 97, chunk=8, label_smoothing=0.1),
    Case("smoothed_soft_cap", 21, 32, 90, chunk=8, soft_cap=3.0, label_smoothing=0.3),
    Case("smoothed_tokens", 17, 32, 4099, label_smoothing=0.2, per_token=True),
    Case("tokens_empty", 0, 32, 50, ignored="none", per_token=True),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """float32 ``hidden``, ``weight`` and ``dy``, the result's gradient (scalar or ``[tokens]``); int32 ``targets [tokens]``."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, case.vocab, case.tokens).astype(np.int32)
    if case.ignored == "all":
        targets[:] = case.ignore_index
    elif case.ignored == "some":
        targets[::3] = case.ignore_index
    scale = case.spread * case.width**-0.5
    dy = generator.standard_normal(case.tokens) if case.per_token else 0.37
    return {
        "hidden": generator.standard_normal((case.tokens, case.width)).astype(np.float32),
        "weight": (generator.standard_normal((case.vocab, case.width)) * scale).astype(np.float32),
        "targets": targets,
        "dy": np.asarray(dy, np.float32),
    }
