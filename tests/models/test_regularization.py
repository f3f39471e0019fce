"""What training adds to the plain loss is the same on both backends, by the composed ops and by the written-out passes."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsloth.backend import BuildOptions, OptimizerOptions
from jaxsloth.objectives.causal_lm import CausalLoss
from tests.support.small_models import VOCAB, build
from tests.support.sources import examples, stream

BAR = 1e-5
SHAPE = {"num_hidden_layers": 2, "intermediate_size": 128}
WAYS = {
    "torch": ("torch", {}),
    "torch fused": ("torch", {"train_pass": "fused"}),
    "jax": ("jax", {}),
    "jax fused": ("jax", {"train_pass": "fused"}),
}


def losses(way: str, objective: CausalLoss, **step_batches) -> np.ndarray:
    """Of three steps; each depends on the gradients of those before it."""
    backend, implementations = WAYS[way]
    model, *_ = build(backend, SHAPE, options=BuildOptions(implementations=implementations))
    step = model.step(objective, OptimizerOptions())
    rows = stream(examples(6, VOCAB), **({"pad_to_multiple_of": 64} | step_batches))  # one length: one program
    return np.array([step(rows.batch(n), learning_rate=1e-2, step=n, seed=7).floats()[0] for n in range(3)])


BOTH = CausalLoss(embedding_noise=20.0, label_smoothing=0.2)


@pytest.fixture(scope="module")
def judge():
    return losses("torch", BOTH)


@pytest.mark.parametrize("way", ["torch fused", "jax", pytest.param("jax fused", marks=pytest.mark.slow)])
def test_losses_are_the_same_every_way(way, judge):
    assert np.abs(losses(way, BOTH) - judge).max() < BAR


@pytest.mark.parametrize("one", [CausalLoss(), CausalLoss(embedding_noise=20.0), CausalLoss(label_smoothing=0.2)])
def test_each_counts(one, judge):
    assert np.abs(losses("torch", one) - judge).min() > 1e-3


@pytest.mark.parametrize("step_batches", [{"batch_size": 2, "accumulation": 2}, {"pad_to_multiple_of": 8}])
def test_noise_knows_neither_accumulation_nor_padding(step_batches, judge):
    """A row's noise is keyed by its place in the step, and its magnitude by its own length."""
    assert np.abs(losses("torch", BOTH, **step_batches) - judge).max() < BAR


@pytest.mark.parametrize("wrong", [{"embedding_noise": -1.0}, {"embedding_noise": float("inf")}, {"label_smoothing": 1.0}])
def test_numbers_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.* must be at least 0"):
        CausalLoss(**wrong)
