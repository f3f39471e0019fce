"""Row order and split: the seed alone decides, and Philox is the published one."""

import numpy as np
import pytest

from jaxsloth.data.errors import DataError
from jaxsloth.data.order import epoch_order, split_rows

COUNTS = [1, 2, 7, 1000]


def philox_words(count, key):
    """Philox 4x64-10 after Salmon et al. 2011, in Python integers; the counter is raised before each block, as numpy does."""
    words = []
    for block in range(1, -(-count // 4) + 1):
        x, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(high >> 64) ^ x[1] ^ k[0], high % 2**64, (low >> 64) ^ x[3] ^ k[1], low % 2**64]
            k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
        words += x
    return words[:count]


@pytest.mark.parametrize("count", COUNTS)
def test_order_is_that_of_philox(count):
    words = philox_words(count, (7, 3))
    assert epoch_order(count, 7, 3, shuffle=True).tolist() == sorted(range(count), key=words.__getitem__)
    assert epoch_order(count, 7, 3, shuffle=False).tolist() == list(range(count))


def test_seeds_and_epochs_differ():
    orders = [tuple(epoch_order(50, seed, epoch, shuffle=True)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 10), (0.001, 1), (0.999, 99)])
def test_split_is_disjoint_and_whole(fraction, held_out):
    train, validation = split_rows(100, fraction, seed=5)
    assert len(validation) == held_out
    assert sorted([*train, *validation]) == list(range(100))
    assert np.all(np.diff(train) > 0)
    assert np.all(np.diff(validation) > 0)


def test_split_follows_the_seed_and_not_the_first_epoch():
    again, other = (split_rows(1000, 0.1, seed)[1].tolist() for seed in (5, 6))
    assert again == split_rows(1000, 0.1, 5)[1].tolist()
    assert again != other
    assert again != sorted(epoch_order(1000, 5, 0, shuffle=True)[:100].tolist())


def test_split_needs_two_rows():
    with pytest.raises(DataError, match="at least 2 rows, and there are 1"):
        split_rows(1, 0.5, 0)
