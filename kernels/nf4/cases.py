"""The weights that every NF4 implementation is tested and measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxsloth.kernels.nf4.contract import BLOCK, CODE

Fill = Literal["normal", "zero_blocks", "all_zero", "negative_zero", "outliers", "wide", "ties", "scaled_ties"]


@dataclass(frozen=True)
class Case:
    """A weight ``[out, in]``; `fill` says what its values are like."""

    name: str
    out: int
    in_: int
    fill: Fill = "normal"


CASES: tuple[Case, ...] = (
    Case("square", 64, 128),
    Case("one_block", 1, 64),
    Case("one_row", 1, 576),
    Case("less_than_a_block", 3, 10),
    Case("partial_last_block", 5, 30),
    Case("odd_size", 3, 7),
    Case("odd_size_over_blocks", 13, 37),
    Case("blocks_cross_rows", 48, 100),
    Case("nested_partial", 96, 200),
    Case("nested_exact", 256, 64),
    Case("nested_one_more", 257, 64),
    Case("projection", 192, 576),
    Case("zero_blocks", 32, 128, "zero_blocks"),
    Case("zero_partial_block", 5, 30, "zero_blocks"),
    Case("all_zero", 4, 96, "all_zero"),
    Case("negative_zero", 8, 64, "negative_zero"),
    Case("outliers", 64, 64, "outliers"),
    Case("wide", 64, 64, "wide"),
    Case("ties", 16, 64, "ties"),
    Case("scaled_ties", 3, 85, "scaled_ties"),
)


def make_inputs(case: Case, seed: int) -> dict[str, np.ndarray | None]:
    """``weight`` float32 ``[out, in]`` and ``offset``, a float32 scalar: the mean of the blocks' maxima."""
    generator = np.random.default_rng(seed)
    size = case.out * case.in_
    flat = generator.standard_normal(size).astype(np.float32) * np.float32(0.02)
    blocks = -(-size // BLOCK)
    block_of = np.arange(size) // BLOCK
    if case.fill == "zero_blocks":
        flat[(block_of % 3 == 0) | (block_of == blocks - 1)] = 0.0
    elif case.fill == "all_zero":
        flat[:] = 0.0
    elif case.fill == "negative_zero":
        flat[::3] = -0.0
        flat[block_of == 0] = -0.0
    elif case.fill == "outliers":
        flat[generator.integers(0, size, max(size // 100, 1))] *= np.float32(1000.0)
    elif case.fill == "wide":
        flat *= (10.0 ** generator.uniform(-25, 4, blocks)).astype(np.float32)[block_of]
    elif case.fill in ("ties", "scaled_ties"):
        # Exactly between two code values, and one float32 to each side; a leading 1.0 keeps the scale exact. Scaled, it
        # shows whether a value is divided by the scale or multiplied by its reciprocal.
        midpoints = (CODE[:-1] + CODE[1:]) / np.float32(2)
        near = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))])
        flat = generator.choice(near, size)
        flat[::BLOCK] = 1.0
        if case.fill == "scaled_ties":
            flat *= generator.uniform(0.01, 3.0, blocks).astype(np.float32)[block_of]
    maxima = [np.abs(flat[start : start + BLOCK]).max() for start in range(0, size, BLOCK)]
    offset = np.mean(np.asarray(maxima, np.float64)).astype(np.float32)
    return {"weight": flat.reshape(case.out, case.in_), "offset": np.asarray(offset)}


@dataclass(frozen=True)
class MatvecCase:
    """x ``[rows, in]`` and weights ``[out, in]`` that share it; strided: the rows of x lie apart."""

    name: str
    rows: int
    in_: int
    outs: tuple[int, ...]
    strided: bool = False
    bias: bool = False


MATVEC_CASES: tuple[MatvecCase, ...] = (
    MatvecCase("one_block", 1, 64, (1,)),
    MatvecCase("one_row", 1, 576, (192,)),
    MatvecCase("odd_out", 1, 320, (37,), bias=True),
    MatvecCase("qkv", 1, 1024, (64, 24, 40), bias=True),
    MatvecCase("long_rows", 1, 4160, (24, 8)),
    MatvecCase("two_rows", 2, 576, (70,)),
    MatvecCase("eight_rows", 8, 1088, (96, 33, 64), bias=True),
    MatvecCase("strided", 5, 640, (40, 48), strided=True),
    MatvecCase("sixteen_rows", 16, 704, (80,)),
)


def make_matvec_inputs(case: MatvecCase, seed: int) -> dict[str, np.ndarray | None]:
    """``x`` float32 ``[rows, in]``, ``weight0 …`` and ``bias`` float32 ``[sum of out]`` or None."""
    generator = np.random.default_rng(seed)
    found: dict[str, np.ndarray | None] = {"x": generator.standard_normal((case.rows, case.in_)).astype(np.float32)}
    for place, out in enumerate(case.outs):
        found[f"weight{place}"] = (0.02 * generator.standard_normal((out, case.in_))).astype(np.float32)
    found["bias"] = generator.standard_normal(sum(case.outs)).astype(np.float32) if case.bias else None
    return found
