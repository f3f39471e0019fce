"""The noise by its formula: the cipher on Python integers, the rest in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsloth.kernels.dropout.reference import threefry_2x32


def embedding_noise(
    key: tuple[int, int], rows: Sequence[int], segments: np.ndarray, channels: int, *, alpha: float
) -> np.ndarray:
    """float64 ``[batch, length, channels]``, as the contract says."""
    length = segments.shape[1]
    noise = np.zeros((len(rows), length, channels))
    for index, row in enumerate(rows):
        for position, segment in enumerate(segments[index]):
            if segment == 0:
                continue
            magnitude = alpha / np.sqrt(np.count_nonzero(segments[index] == segment) * channels)
            for channel in range(channels):
                word = threefry_2x32(key, (row, position * channels + channel))[0] >> 8
                noise[index, position, channel] = magnitude * (word / 2**23 - 1.0)
    return noise
