"""L1: every op on both backends, output and every gradient, against its float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxsloth.backend import BACKENDS, BackendName, DtypeName, load_backend
from jaxsloth.kernels.registry import Op, Target, all_ops, select
from jaxsloth.parity import bars
from jaxsloth.parity.measure import Measurement
from jaxsloth.parity.op_runners import ARGUMENTS, RUNNERS, Result, part, prepare, run_reference

RUNG = "L1"
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16")


def measure() -> Iterator[Measurement]:
    """For each op, backend and dtype: the largest share of its tolerance that any case uses up, output or gradient.

    The implementation is the one that the registry chooses on this machine.
    """
    for op in all_ops():
        if op.name not in ARGUMENTS:
            # NF4's own ops are L0's. A dropout mask has no tolerance, and an 8-bit AdamW step no gradient: tests/kernels checks
            # the one bit for bit and the other state for state against bitsandbytes.
            continue
        for dtype in DTYPES:
            cases = part(op.name, "cases").CASES
            references = {case.name: run_reference(op.name, case, prepare(op.name, case, dtype)) for case in cases}
            for backend in BACKENDS:
                yield _worst(op, backend, dtype, cases, references)


def _worst(op: Op, backend: BackendName, dtype: DtypeName, cases: Any, references: dict[str, Result]) -> Measurement:
    target = Target(platform=load_backend(backend).devices().platform, dtype=dtype)
    tolerance = part(op.name, "contract").TOLERANCES[dtype]
    shares: dict[str, float] = {}
    for case in cases:
        got = RUNNERS[backend](op, case, prepare(op.name, case, dtype), target)
        for name, expected in references[case.name].items():
            bar = tolerance.output if name == "output" else tolerance.gradient
            shares[f"{case.name}, {name}"] = error(got[name], expected) / bar
    worst = max(shares, key=lambda key: shares[key])
    chosen = select(op, backend, target).implementation.name
    what = f"{op.name} {dtype}, {backend} ({chosen})"
    return Measurement(RUNG, what, shares[worst], bars.L1_SHARE_OF_TOLERANCE, note=f"{len(cases)} cases; worst: {worst}")


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """``||got - expected|| / ||expected||``; where zeros are expected (a softmax over one key), the root mean square of `got`.

    Inputs are around 1, so rounding noise in place of a zero is held to the same bar as a relative error.
    """
    if got.shape != expected.shape:
        return float("inf")
    distance, size = float(np.linalg.norm(got - expected)), float(np.linalg.norm(expected))
    return distance / size if size > 1e-12 else distance / max(expected.size, 1) ** 0.5
