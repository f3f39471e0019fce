"""Philox-4x32 masks on Python integers, one element at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsloth.kernels.dropout.contract import MULTIPLIERS, ROUNDS, WEYL, share_of, threshold

WORD = 2**32
Words = tuple[int, int, int, int]


def philox_4x32(key: tuple[int, int], counter: Words, rounds: int = ROUNDS) -> Words:
    """The generator of Salmon et al. 2011, in arithmetic modulo 2**32."""
    (k0, k1), (a, b, c, d) = key, counter
    for _ in range(rounds):
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = second // WORD ^ b ^ k0, second % WORD, first // WORD ^ d ^ k1, first % WORD
        k0, k1 = (k0 + WEYL[0]) % WORD, (k1 + WEYL[1]) % WORD
    return a, b, c, d


def keep_mask(key: tuple[int, int], rows: Sequence[int], length: int, channels: int, *, rate: float) -> np.ndarray:
    """bool ``[batch, length, channels]``, as the contract says."""
    bar, share = threshold(rate), share_of(channels)
    mask = np.empty((len(rows), length, channels), bool)
    for index, row in enumerate(rows):
        for position in range(length):
            words = [philox_4x32(key, (place, position, row % WORD, 0)) for place in range(share)]
            for channel in range(channels):
                half = channel // share
                word = words[channel % share][half // 2]
                mask[index, position, channel] = (word // 2**16 if half % 2 else word % 2**16) >= bar
    return mask
