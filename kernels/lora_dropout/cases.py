"""The shapes that every lora_dropout implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxsloth.kernels.dropout.contract import module_word, step_key


@dataclass(frozen=True)
class Case:
    """Tokens ``first …`` of ``[len(rows) · length]`` through modules of these ranks."""

    name: str
    rows: tuple[int, ...]
    length: int
    in_: int
    ranks: tuple[int, ...]
    rate: float = 0.1
    first: int = 0
    step: int = 3

    @property
    def words(self) -> list[int]:
        """The modules' words."""
        return [module_word(f"model.layers.0.self_attn.{name}_proj") for name in "qkvo"[: len(self.ranks)]]

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.length - self.first


CASES: tuple[Case, ...] = (
    Case("plain", (0, 1), 16, 64, (8,)),
    Case("group", (1, 4), 20, 256, (16, 16, 16), rate=0.3),
    Case("odd", (7, 1000003), 11, 37, (3, 5), rate=0.75, first=6),
    Case("many_tiles", (0, 1, 2), 27, 500, (4,), rate=0.05),
    Case("wide_rank", (5,), 9, 40, (200,), rate=0.5),
    Case("one_channel", (-1,), 2, 1, (1,), rate=0.5),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray]:
    """x ``[tokens, in]``, a ``[rank, in]`` and dy ``[tokens, rank]`` float32; key uint32 ``[2]``, modules uint32 ``[n]``, rows
    int32 ``[batch]``."""
    generator, rank = np.random.default_rng(seed), sum(case.ranks)

    def normal(*shape: int, std: float = 1.0) -> np.ndarray:
        return (generator.standard_normal(shape) * std).astype(np.float32)

    return {
        "x": normal(case.tokens, case.in_),
        "a": normal(rank, case.in_, std=case.in_**-0.5),
        "dy": normal(case.tokens, rank),
        "key": np.array(step_key(seed, case.step), np.uint32),
        "modules": np.array(case.words, np.uint32),
        "rows": np.array(case.rows, np.int32),
    }
