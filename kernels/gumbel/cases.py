"""The draws that every gumbel_draw implementation is tested on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxsloth.kernels.gumbel.contract import seed_words


@dataclass(frozen=True)
class Case:
    """Draws among `listed` tokens of each row, in an order of their own; 0: among all. removed: of each row."""

    name: str
    batch: int
    vocab: int
    listed: int = 0
    removed: int = 0


CASES: tuple[Case, ...] = (
    Case("whole", 3, 50),
    Case("one_token", 2, 1),
    Case("listed", 4, 131, listed=24, removed=5),
    Case("several_programs", 2, 2300, removed=40),
    Case("one_left", 2, 33, removed=32),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """scores float32 ``[batch, n]``, ids int32 alike or None, keys uint32 ``[batch, 2]``, rows, positions int32 ``[batch]``."""
    generator = np.random.Generator(np.random.Philox(seed))
    count = case.listed or case.vocab
    scores = generator.normal(0, 2, (case.batch, count)).astype(np.float32)
    for row in scores:
        row[generator.permutation(count)[: case.removed]] = -np.inf
    ids = np.stack([generator.permutation(case.vocab)[:count] for _ in range(case.batch)]).astype(np.int32)
    keys = np.array([seed_words(seed + (5 << 40) + row % 2) for row in range(case.batch)], np.uint32)
    rows = np.arange(case.batch, dtype=np.int32)
    return {
        "scores": scores,
        "ids": ids if case.listed else None,
        "keys": keys,
        "rows": rows,
        "positions": 7 * rows + 1000,
    }
