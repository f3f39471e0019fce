"""Losses as functions of log-probs: the stated values and gradients, in every framework, against torch's autograd."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from jaxsloth.objectives.preference import REFERENCE, PreferenceLoss

SIGMOID = "sigmoid"
# What the papers say of d, the difference of the pair's ratios, those of IPO by length.
PAPERS = {
    PreferenceLoss(SIGMOID, 0.3): lambda d, _: -logsigmoid(0.3 * d),
    PreferenceLoss(SIGMOID, 0.3, 0.2): lambda d, _: -0.8 * logsigmoid(0.3 * d) - 0.2 * logsigmoid(-0.3 * d),
    PreferenceLoss("hinge", 0.3): lambda d, _: torch.relu(1 - 0.3 * d),
    PreferenceLoss("ipo", 0.3): lambda _, means: (means - 1 / 0.6) ** 2,
}
FRAMEWORKS = {
    "numpy": (np, np.asarray, 1e-12),
    "torch": (torch, torch.from_numpy, 1e-12),
    "jax": (jnp, jnp.asarray, 1e-5),
}


def rows() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probs of five pairs that differ, one that doesn't (where every policy begins), and one of nothing."""
    log_probs, reference = np.random.default_rng(0).normal(-40, 9, (2, 14))
    log_probs[10:12] = reference[10:12]
    counts = np.arange(3.0, 17.0)
    counts[12:], reference[12:] = 0.0, np.nan
    return log_probs, {REFERENCE: reference, "counts": counts}


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("objective", PAPERS, ids=str)
def test_losses_and_gradients_are_the_papers(objective, name):
    xp, take, bar = FRAMEWORKS[name]
    log_probs, arrays = rows()
    policy = torch.tensor(log_probs[:12], requires_grad=True)
    ratios = policy - torch.from_numpy(arrays[REFERENCE][:12])
    means = ratios / torch.from_numpy(arrays["counts"][:12])
    expected = PAPERS[objective](ratios[0::2] - ratios[1::2], means[0::2] - means[1::2])
    expected.sum().backward()
    given = {key: take(value) for key, value in arrays.items()}
    losses, grads = objective.losses_and_grads(xp, take(log_probs), given)
    assert policy.grad is not None
    np.testing.assert_allclose(losses, [*expected.tolist(), 0.0], rtol=bar, atol=bar)
    np.testing.assert_allclose(grads, [*policy.grad.tolist(), 0.0, 0.0], rtol=bar, atol=bar)
    if name == "jax":  # its steps take their gradient by AD
        own = jax.grad(lambda log_probs: objective.losses_and_grads(xp, log_probs, given)[0].sum())(take(log_probs))
        np.testing.assert_allclose(own, grads, rtol=bar, atol=bar)
