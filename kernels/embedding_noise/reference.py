"""The noise by its formula: the cipher on Python integers, the rest in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsloth.kernels.embedding_noise.contract import PARITY, ROTATIONS

WORD = 2**32


def threefry_2x32(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """The cipher of Salmon et al. 2011 with 20 rounds, in arithmetic modulo 2**32."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    x, y = (counter[0] + schedule[0]) % WORD, (counter[1] + schedule[1]) % WORD
    for round_ in range(20):
        by = ROTATIONS[round_ // 4 % 2][round_ % 4]
        x = (x + y) % WORD
        y = ((y * 2**by) % WORD + y // 2 ** (32 - by)) ^ x
        if round_ % 4 == 3:
            injection = round_ // 4 + 1
            x = (x + schedule[injection % 3]) % WORD
            y = (y + schedule[(injection + 1) % 3] + injection) % WORD
    return x, y


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
