"""Row order and the train/validation split, from the seed alone.

Philox's raw 64-bit words are sorted, instead of asking numpy's Generator for a permutation: the words are fixed by the
algorithm (Salmon et al. 2011), and a Generator's methods may change their stream between numpy versions (NEP 19).
"""

from __future__ import annotations

import numpy as np

from jaxsloth.data.errors import DataError

# Epochs count from 0, so the last key word of all can't meet one.
_SPLIT_STREAM = 2**64 - 1


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order in which an epoch visits `count` rows: int64 ``[count]``, a permutation; 0, 1, 2… without shuffle."""
    return _permutation(count, seed, epoch) if shuffle else np.arange(count, dtype=np.int64)


def split_rows(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows train and which are held out: two ascending int64 arrays, disjoint, together all rows.

    round(count · fraction) rows are held out, and at least one is on each side.

    Raises:
        DataError: fewer than two rows.
    """
    if count < 2:
        raise DataError(f"holding out validation rows needs at least 2 rows, and there are {count}")
    held_out = min(max(round(count * fraction), 1), count - 1)
    order = _permutation(count, seed, _SPLIT_STREAM)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _permutation(count: int, seed: int, stream: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
