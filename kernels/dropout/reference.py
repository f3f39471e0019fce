"""Threefry-2x32 masks on Python integers, one element at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsloth.kernels.dropout.contract import PARITY, ROTATIONS, threshold

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


def keep_mask(key: tuple[int, int], rows: Sequence[int], length: int, channels: int, *, rate: float) -> np.ndarray:
    """bool ``[batch, length, channels]``, as the contract says."""
    bar = threshold(rate)
    words = [[threefry_2x32(key, (row, position))[0] >= bar for position in range(length * channels)] for row in rows]
    return np.array(words, bool).reshape(len(rows), length, channels)
