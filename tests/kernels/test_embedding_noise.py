"""NEFTune's noise on both frameworks: the reference's numbers, transformers' magnitude, and what must not change it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from jaxsloth.kernels.dropout.contract import module_key
from jaxsloth.kernels.embedding_noise import reference, torch_ops, xla_ops
from jaxsloth.kernels.embedding_noise.cases import CASES, make_inputs
from jaxsloth.kernels.embedding_noise.contract import RELATIVE


def on_torch(key, rows, segments, channels, alpha=5.0):
    words, numbers, seen = (torch.from_numpy(np.asarray(array, np.int64)) for array in (key, rows, segments))
    return torch_ops.embedding_noise(words, numbers, seen, channels, alpha=alpha).numpy()


def on_jax(key, rows, segments, channels, alpha=5.0):
    words = jnp.asarray(np.asarray(key, np.uint32))
    numbers, seen = (jnp.asarray(np.asarray(array, np.int32)) for array in (rows, segments))
    return np.asarray(xla_ops.embedding_noise(words, numbers, seen, channels, alpha=alpha))


both = pytest.mark.parametrize("noise", [on_torch, on_jax])


@both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_reference(noise, case):
    inputs = make_inputs(case, 1234567890123)
    key = (int(inputs["key"][0]), int(inputs["key"][1]))
    expected = reference.embedding_noise(key, inputs["rows"].tolist(), inputs["segments"], case.channels, alpha=case.alpha)
    got = noise(**inputs, channels=case.channels, alpha=case.alpha)
    assert got.dtype == np.float32 and (got[inputs["segments"] == 0] == 0).all()
    np.testing.assert_allclose(got, expected, rtol=RELATIVE, atol=1e-9)


@both
def test_the_magnitude_is_transformers(noise):
    """Uniform between the bounds of transformers' hook, where there is no padding."""
    embedding = torch.nn.Embedding(7, 96)
    embedding.weight.data.zero_()
    embedding.neftune_noise_alpha = 5.0
    theirs = neftune_post_forward_hook(embedding, None, embedding(torch.zeros(8, 50, dtype=torch.long))).detach().numpy()
    ours = noise(module_key(0, 0, "a"), range(8), np.ones((8, 50)), 96)
    bound = 5.0 / np.sqrt(50 * 96)
    assert np.abs(theirs).max() == pytest.approx(bound, rel=1e-3) and np.abs(ours).max() == pytest.approx(bound, rel=1e-3)
    assert np.abs(ours).max() <= bound * (1 + RELATIVE)
    assert abs(ours.mean()) < 5 * bound / np.sqrt(3 * ours.size)
    assert ours.var() == pytest.approx(bound**2 / 3, rel=2e-2)
    steps = np.linspace(0, 1, 101)
    assert np.quantile(ours, steps) == pytest.approx(bound * (2 * steps - 1), abs=bound * 0.02)


@both
def test_a_token_has_its_noise_wherever_its_row_is_put(noise):
    key, segments = module_key(3, 9, "a"), np.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
    whole = noise(key, [0, 1], segments, 6)
    longer = noise(key, [1, 0], np.pad(segments[::-1], ((0, 0), (0, 4))), 6)
    assert np.array_equal(longer[::-1, :5], whole)
    for other in (module_key(4, 9, "a"), module_key(3, 10, "a"), module_key(3, 9, "b")):
        assert not np.isclose(noise(other, [0, 1], segments, 6), whole)[segments > 0].any()
