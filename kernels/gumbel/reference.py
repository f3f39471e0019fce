"""The noise by its formula: the generator on Python integers, the logarithms in float64."""

from __future__ import annotations

import numpy as np

from jaxsloth.kernels.dropout.reference import philox_4x32
from jaxsloth.kernels.gumbel.contract import DOMAIN, MOST, share_of


def noise(keys: np.ndarray, rows: np.ndarray, positions: np.ndarray, vocab: int) -> np.ndarray:
    """float64 ``[batch, vocab]``."""
    share, found = share_of(vocab), np.empty((len(rows), vocab))
    for place, (key, row, position) in enumerate(zip(keys, rows, positions, strict=True)):
        words = [philox_4x32((int(key[0]), int(key[1])), (count, int(position), int(row), DOMAIN)) for count in range(share)]
        for token in range(vocab):
            word = np.float32(words[token % share][token // share])
            v = min(float((word + np.float32(0.5)) * np.float32(2.0**-32)), MOST)
            found[place, token] = -np.log(-np.log1p(-v))
    return found


def draw(
    scores: np.ndarray, ids: np.ndarray | None, keys: np.ndarray, rows: np.ndarray, positions: np.ndarray, *, vocab: int
) -> np.ndarray:
    """int64 ``[batch]``, as the contract says."""
    added = noise(keys, rows, positions, vocab)
    return np.argmax(scores + (added if ids is None else np.take_along_axis(added, ids, axis=1)), axis=1)
