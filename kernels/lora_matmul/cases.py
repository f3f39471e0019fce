"""The shapes that every lora_matmul implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxsloth.kernels.dropout.contract import module_key
from jaxsloth.kernels.nf4.contract import BLOCK


@dataclass(frozen=True)
class Case:
    """``x [*lead, in_]`` through a base ``[out, in_]`` of the given kind; rank 0 is no adapter."""

    name: str
    lead: tuple[int, ...]
    in_: int
    out: int
    rank: int = 8
    base: Literal["dense", "nf4", "nf4_nested"] = "dense"
    bias: bool = False
    dropout: float = 0.0
    scale: float = 2.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``lora_matmul`` that are not arrays."""
        return {"scale": self.scale}


CASES: tuple[Case, ...] = (
    Case("dense", (2, 16), 64, 96),
    Case("dense_bias", (2, 16), 64, 96, bias=True),
    Case("dense_no_adapter", (2, 16), 64, 96, rank=0, bias=True),
    Case("nf4", (2, 16), 64, 96, base="nf4"),
    Case("nf4_nested", (2, 16), 128, 192, base="nf4_nested", bias=True),
    Case("nf4_no_adapter", (3, 5), 64, 96, rank=0, base="nf4"),
    Case("blocks_cross_rows", (1, 7), 100, 36, rank=4, base="nf4_nested"),
    Case("single_row", (1, 1), 64, 96, base="nf4"),
    Case("empty", (0, 16), 64, 96, base="nf4", bias=True),
    Case("flat", (37,), 48, 50, rank=3),
    Case("rank_1", (2, 9), 65, 33, rank=1, scale=0.3),
    Case("rank_over_width", (2, 9), 24, 40, rank=32),
    Case("dropout", (3, 11), 64, 96, dropout=0.25),
    Case("dropout_nf4", (2, 16), 64, 96, base="nf4", dropout=0.1, bias=True),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """Arrays of one case.

    Returns:
        x ``[*lead, in]``, weight ``[out, in]`` (what an NF4 base is quantized from, with ``offset``, a float32 scalar, where it
        is nested), lora_a ``[r, in]`` and lora_b ``[out, r]`` or None, bias ``[out]`` or None, dy ``[*lead, out]``, all
        float32; with dropout, key uint32 ``[2]`` and rows int32 ``[batch]``, else None.
    """
    generator = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 1.0) -> np.ndarray:
        return (generator.standard_normal(shape) * std).astype(np.float32)

    weight = normal(case.out, case.in_, std=case.in_**-0.5)
    flat = np.abs(weight).ravel()
    maxima = np.maximum.reduceat(flat, np.arange(0, flat.size, BLOCK)).astype(np.float64)
    has_adapter = case.rank > 0
    return {
        "x": normal(*case.lead, case.in_),
        "weight": weight,
        "offset": np.asarray(maxima.mean().astype(np.float32)) if case.base == "nf4_nested" else None,
        "lora_a": normal(case.rank, case.in_, std=case.in_**-0.5) if has_adapter else None,
        "lora_b": normal(case.out, case.rank, std=0.3 * case.rank**-0.5) if has_adapter else None,
        "bias": normal(case.out) if case.bias else None,
        "dy": normal(*case.lead, case.out),
        "key": np.array(module_key(seed, 3, "model.layers.0.self_attn.q_proj"), np.uint32) if case.dropout else None,
        "rows": np.arange(case.lead[0], dtype=np.int32) * 3 + 1 if case.dropout else None,
    }
