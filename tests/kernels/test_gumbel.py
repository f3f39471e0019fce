"""Draws by Gumbel noise on both frameworks: the reference's noise and draws, and frequencies that are the softmax's."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from jaxsloth.kernels.gumbel import reference, torch_ops, xla_ops
from jaxsloth.kernels.gumbel.cases import CASES, make_inputs
from jaxsloth.kernels.gumbel.contract import RELATIVE, seed_words
from tests.kernels.torch_checks import to_torch


def on_torch(function, *arrays, vocab):
    return function(*to_torch(dict(enumerate(arrays)), "cpu").values(), vocab=vocab).numpy()


def on_jax(function, *arrays, vocab):
    return np.asarray(function(*(None if a is None else jnp.asarray(a) for a in arrays), vocab=vocab))


both = pytest.mark.parametrize(("ops", "on"), [(torch_ops, on_torch), (xla_ops, on_jax)], ids=["torch", "jax"])


@both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_reference(ops, on, case):
    inputs = make_inputs(case, 1234567890123)
    scores, ids, keys, rows, positions = inputs.values()
    assert scores is not None and keys is not None and rows is not None and positions is not None
    counted, whole = (keys, rows, positions), reference.noise(keys, rows, positions, case.vocab)
    expected = whole if ids is None else np.take_along_axis(whole, ids, axis=1)
    got = on(ops.noise, ids, *counted, vocab=case.vocab)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=RELATIVE, atol=RELATIVE)
    drawn = on(ops.draw, scores, ids, *counted, vocab=case.vocab)
    assert np.array_equal(drawn, np.argmax(scores + expected, axis=1))


@pytest.mark.parametrize("ops", [torch_ops, xla_ops], ids=["torch", "jax"])
def test_the_ends_of_the_noise(ops):
    """The smallest and the largest word, and those about the border of the series."""
    words = np.array([0, 1, 2**28 - 300, 2**28 - 1, 2**28, 2**28 + 300, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    array = torch.from_numpy(words.astype(np.int64)) if ops is torch_ops else jnp.asarray(words)
    got = np.asarray(ops.noise_of(array))
    v = np.minimum(((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64), 1 - 2.0**-24)
    np.testing.assert_allclose(got, -np.log(-np.log1p(-v)), rtol=RELATIVE, atol=RELATIVE)


@both
def test_frequencies_are_the_softmaxs(ops, on):
    """Over positions, over rows and over seeds."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.06, 0.03, 0.01])
    count = 20_000
    scores = np.broadcast_to(np.log(probabilities).astype(np.float32), (count, 6)).copy()
    same, other = np.zeros(count, np.int32), np.arange(count, dtype=np.int32)
    seeds = np.array([seed_words(3)] * count, np.uint32), np.array([seed_words(seed) for seed in range(count)], np.uint32)
    for keys, rows, positions in ((seeds[0], same, other), (seeds[0], other, same), (seeds[1], same, same)):
        drawn = on(ops.draw, scores, None, keys, rows, positions, vocab=6)
        assert chisquare(np.bincount(drawn, minlength=6), probabilities * count).pvalue > 1e-3
