"""The shapes and masks that every attention implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Case:
    """Queries ``[batch, q_length, heads, head_dim]`` on keys ``[batch, kv_length, kv_heads, head_dim]``.

    segments: "packed" cuts every row into documents, the last slots padding; "right" and "left" pad one side, each row by
    another amount; "cache" gives separate q_segments and kv_segments, as decoding on a left-padded cache does.
    """

    name: str
    batch: int
    q_length: int
    heads: int
    kv_heads: int
    head_dim: int
    kv_length: int | None = None
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    segments: Literal["packed", "right", "left", "cache"] | None = None
    q_offset: int = 0
    spread: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``attention`` that are not arrays."""
        return {
            "scale": self.head_dim**-0.5,
            "causal": self.causal,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "q_offset": self.q_offset,
        }


CASES: tuple[Case, ...] = (
    Case("causal", 2, 16, 4, 4, 16),
    Case("grouped", 2, 16, 6, 2, 16),
    Case("one_kv_head", 1, 19, 4, 1, 24),
    Case("smollm2_heads", 1, 33, 9, 3, 64),
    Case("bidirectional", 2, 13, 4, 2, 16, causal=False),
    Case("window", 2, 21, 4, 2, 16, window=5),
    Case("window_of_one", 1, 9, 2, 2, 16, window=1),
    Case("window_over_length", 1, 9, 2, 2, 16, window=64),
    Case("window_bidirectional", 2, 21, 4, 4, 16, causal=False, window=4),
    Case("soft_cap", 2, 17, 4, 2, 16, soft_cap=5.0, spread=3.0),
    Case("window_soft_cap_packed", 2, 24, 4, 2, 16, window=6, soft_cap=20.0, segments="packed"),
    Case("packed", 3, 31, 4, 2, 16, segments="packed"),
    Case("packed_bidirectional", 2, 31, 4, 4, 16, causal=False, segments="packed"),
    Case("right_padded", 3, 18, 4, 2, 16, segments="right"),
    Case("left_padded", 3, 18, 4, 2, 16, segments="left"),
    Case("single_query", 1, 1, 2, 1, 16),
    Case("decode", 2, 1, 4, 2, 16, kv_length=24, q_offset=11),
    Case("decode_window", 2, 1, 4, 2, 16, kv_length=24, q_offset=11, window=4),
    Case("chunked_prefill", 2, 7, 4, 2, 16, kv_length=24, q_offset=9),
    Case("decode_left_padded", 3, 2, 4, 2, 16, kv_length=20, q_offset=12, segments="cache"),
    Case("cross", 2, 5, 4, 4, 16, kv_length=11, causal=False),
    Case("large_scores", 1, 16, 2, 2, 16, spread=6.0),
    Case("empty_batch", 0, 8, 4, 2, 16),
    # Longer than a kernel's tiles: some are met whole, some cut, some skipped.
    Case("long_soft_cap", 1, 200, 2, 1, 64, soft_cap=20.0),
    Case("long_window_soft_cap", 1, 210, 1, 1, 96, window=140, soft_cap=20.0),
    Case("long_packed_soft_cap", 2, 150, 2, 1, 16, soft_cap=5.0, segments="packed", spread=3.0),
    Case("long_window_bidirectional", 1, 220, 1, 1, 32, causal=False, window=135, soft_cap=20.0),
    Case("wide_heads_soft_cap", 1, 40, 2, 1, 256, soft_cap=20.0),
)


def _segments(case: Case, kv_length: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    if case.segments is None:
        return None, None
    slots = np.arange(kv_length)[None, :]
    rows = np.arange(case.batch)[:, None]
    if case.segments == "packed":
        documents = slots // (5 + rows) + 1
        return np.where(slots < kv_length - 2 - rows, documents, 0).astype(np.int32), None
    if case.segments == "right":
        return (slots < kv_length - 3 * rows).astype(np.int32), None
    left = (slots >= 3 * rows).astype(np.int32)
    if case.segments == "left":
        return left, None
    return left[:, case.q_offset : case.q_offset + case.q_length], left


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """float32 ``q``, ``k``, ``v`` and ``dy`` (like q); int32 ``q_segments`` and ``kv_segments``, or None."""
    generator = np.random.default_rng(seed)
    kv_length = case.q_length if case.kv_length is None else case.kv_length
    q_shape = (case.batch, case.q_length, case.heads, case.head_dim)
    kv_shape = (case.batch, kv_length, case.kv_heads, case.head_dim)
    q_segments, kv_segments = _segments(case, kv_length)
    return {
        "q": (generator.standard_normal(q_shape) * case.spread).astype(np.float32),
        "k": generator.standard_normal(kv_shape).astype(np.float32),
        "v": generator.standard_normal(kv_shape).astype(np.float32),
        "dy": generator.standard_normal(q_shape).astype(np.float32),
        "q_segments": q_segments,
        "kv_segments": kv_segments,
    }


@dataclass(frozen=True)
class CachedCase:
    """A token at `slot` of caches of `capacity` slots; firsts: each row's first slot that is not padding."""

    name: str
    capacity: int
    slot: int
    firsts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    half: int | None = 8  # channels that the tables turn, halved; None: no rotary positions
    window: int | None = None
    soft_cap: float | None = None


CACHED_CASES: tuple[CachedCase, ...] = (
    CachedCase("first_token", 8, 0, (0,)),
    CachedCase("padded_rows", 40, 33, (0, 33, 12)),
    CachedCase("full", 130, 129, (0, 70)),
    CachedCase("many_parts", 700, 500, (3, 499), heads=6, kv_heads=1),
    CachedCase("window", 200, 180, (0, 175), window=65),
    CachedCase("soft_cap", 100, 64, (1, 2), soft_cap=5.0),
    CachedCase("no_rope", 64, 63, (5,), half=None),
    CachedCase("odd_head", 70, 66, (0, 9), heads=3, kv_heads=3, head_dim=24, half=9),
)


def make_cached_inputs(case: CachedCase, seed: int) -> dict[str, np.ndarray | None]:
    """q ``[batch, heads·head_dim]``, k and v ``[batch, kv_heads·head_dim]``, keys, values, cos, sin, float32; first, slot."""
    generator = np.random.default_rng(seed)
    batch, own = len(case.firsts), case.kv_heads * case.head_dim

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    angles = None if case.half is None else generator.uniform(0, 6, (batch, case.half)).astype(np.float32)
    cache = (batch, case.capacity, case.kv_heads, case.head_dim)
    return {
        "q": normal(batch, case.heads * case.head_dim),
        "k": normal(batch, own),
        "v": normal(batch, own),
        "keys": normal(*cache),
        "values": normal(*cache),
        "cos": None if angles is None else np.cos(angles),
        "sin": None if angles is None else np.sin(angles),
        "first": np.array(case.firsts, np.int32),
        "slot": np.array([case.slot], np.int64),
    }
