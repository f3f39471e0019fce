"""The shapes that every rope implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """``x [batch, length, heads, head_dim]`` whose row b starts at position ``first + b``."""

    name: str
    batch: int
    length: int
    heads: int
    head_dim: int
    rotary_dim: int
    first: int = 0
    theta: float = 10000.0
    attention_scaling: float = 1.0
    restart: int | None = None


CASES: tuple[Case, ...] = (
    Case("whole", 2, 16, 4, 32, 32),
    Case("partial", 2, 9, 3, 40, 16),
    Case("single_position", 1, 1, 2, 16, 16, first=37),
    Case("one_pair", 1, 5, 1, 2, 2),
    Case("empty", 0, 8, 2, 16, 16),
    Case("odd_half", 2, 7, 2, 24, 6),
    Case("far", 1, 12, 2, 64, 64, first=8000, theta=500000.0),
    Case("scaled", 2, 6, 2, 16, 16, attention_scaling=1.3),
    Case("packed", 2, 20, 2, 16, 16, restart=7),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """Arrays of one case.

    Returns:
        x and dy float32 ``[batch, length, heads, head_dim]``; positions int32 ``[batch, length]``; inverse_frequencies
        float32 ``[rotary_dim / 2]``; cos and sin float32 ``[batch, length, rotary_dim / 2]``, scaled, from angles that are
        rounded to float32 as the contract says.
    """
    generator = np.random.default_rng(seed)
    shape = (case.batch, case.length, case.heads, case.head_dim)
    slots = np.arange(case.length) if case.restart is None else np.arange(case.length) % case.restart
    positions = (case.first + np.arange(case.batch)[:, None] + slots[None, :]).astype(np.int32)
    exponents = np.arange(0, case.rotary_dim, 2, dtype=np.float64) / case.rotary_dim
    inverse_frequencies = (case.theta**-exponents).astype(np.float32)
    angles = (positions[..., None].astype(np.float32) * inverse_frequencies).astype(np.float64)
    return {
        "x": generator.standard_normal(shape).astype(np.float32),
        "dy": generator.standard_normal(shape).astype(np.float32),
        "positions": positions,
        "inverse_frequencies": inverse_frequencies,
        "cos": (np.cos(angles) * case.attention_scaling).astype(np.float32),
        "sin": (np.sin(angles) * case.attention_scaling).astype(np.float32),
    }
