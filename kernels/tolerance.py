"""How far an implementation may be from the float64 reference. Every op's contract carries one `Tolerance` a dtype."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bars on ``||out - ref|| / ||ref||`` (relative Frobenius) for the output and for every gradient."""

    output: float
    gradient: float
