"""Label smoothing in the op is torch's own, and transformers' LabelSmoother's sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from jaxsloth.kernels.linear_cross_entropy import torch_ops, xla_ops

GENERATOR = np.random.default_rng(0)
HIDDEN = GENERATOR.standard_normal((23, 16)).astype(np.float32)
WEIGHT = GENERATOR.standard_normal((97, 16)).astype(np.float32)
TARGETS = np.where(np.arange(23) % 4, GENERATOR.integers(0, 97, 23), -100)


def on_torch(smoothing):
    hidden = torch.from_numpy(HIDDEN).requires_grad_()
    loss = torch_ops.linear_cross_entropy(
        hidden, torch.from_numpy(WEIGHT), torch.from_numpy(TARGETS), chunk=8, label_smoothing=smoothing
    )
    loss.backward()
    return loss.item(), hidden.grad.numpy()


def on_jax(smoothing):
    def loss(hidden):
        return xla_ops.linear_cross_entropy(
            hidden, jnp.asarray(WEIGHT), jnp.asarray(TARGETS, jnp.int32), chunk=8, label_smoothing=smoothing
        )

    value, slope = jax.value_and_grad(loss)(jnp.asarray(HIDDEN))
    return float(value), np.asarray(slope)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("ours", [on_torch, on_jax])
def test_it_is_torchs_and_transformers(ours, smoothing):
    hidden = torch.from_numpy(HIDDEN).double().requires_grad_()
    logits, targets = hidden @ torch.from_numpy(WEIGHT).double().T, torch.from_numpy(TARGETS)
    judge = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    judge.backward()
    loss, slope = ours(smoothing)
    assert loss == pytest.approx(judge.item(), rel=1e-6)
    assert hidden.grad is not None
    np.testing.assert_allclose(slope, hidden.grad.numpy(), rtol=1e-4, atol=1e-5)
    theirs = LabelSmoother(epsilon=smoothing)({"logits": logits[None]}, targets[None], num_items_in_batch=1)
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
