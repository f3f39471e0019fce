"""Did the contenders do the same work? Their first step's LoRA gradients, compared by layer and by tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

BAR = 2e-2  # relative Frobenius difference of a layer's gradients, bf16 against bf16
_LAYER = re.compile(r"\.layers\.\d+")


def difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest ‖ours - theirs‖ / ‖theirs‖ of any array, and its name; inf where one is not finite or lacking."""
    worst, where = 0.0, ""
    for name, reference in theirs.items():
        norm = float(np.linalg.norm(reference))
        fits = name in ours and ours[name].shape == reference.shape
        found = float(np.linalg.norm(ours[name] - reference)) / norm if fits and norm > 0 else float("inf")
        if not found <= worst:  # NaN is no agreement
            worst, where = (found if np.isfinite(found) else float("inf")), name
    return worst, where


def by_layer(gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each layer's gradients as one vector, by the part of the names that numbers it."""
    found: dict[str, list[np.ndarray]] = {}
    for name, gradient in sorted(gradients.items()):
        layer = _LAYER.search(name)
        found.setdefault(layer[0] if layer else name, []).append(gradient.ravel())
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def compare(files: Mapping[str, Path], references: Collection[str]) -> dict[str, dict[str, Any]]:
    """Of every contender (by label) from every other one among `references`: {"layer": `difference` of a layer's gradients as
    one vector, "tensor": of single tensors, where those of a last layer's queries and keys are small and mostly rounding}."""
    loaded = {label: dict(np.load(file)) for label, file in files.items()}
    return {
        label: {
            other: {"layer": difference(by_layer(ours), by_layer(theirs)), "tensor": difference(ours, theirs)}
            for other, theirs in loaded.items()
            if other != label and other in references
        }
        for label, ours in loaded.items()
    }
