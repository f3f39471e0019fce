"""Did the contenders do the same work? Their first step's LoRA gradients, compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

BAR = 2e-2  # relative Frobenius difference, bf16 against bf16


def difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest ‖ours - theirs‖ / ‖theirs‖ of any tensor, and its name; inf where one is not finite or lacking."""
    worst, where = 0.0, ""
    for name, reference in theirs.items():
        norm = float(np.linalg.norm(reference))
        found = float(np.linalg.norm(ours[name] - reference)) / norm if name in ours and norm > 0 else float("inf")
        if not found <= worst:  # NaN is no agreement
            worst, where = (found if np.isfinite(found) else float("inf")), name
    return worst, where


def compare(files: Mapping[str, Path]) -> dict[str, dict[str, tuple[float, str]]]:
    """`difference` of every contender (by label) from every other one."""
    loaded = {label: dict(np.load(file)) for label, file in files.items()}
    return {
        label: {other: difference(ours, theirs) for other, theirs in loaded.items() if other != label}
        for label, ours in loaded.items()
    }
