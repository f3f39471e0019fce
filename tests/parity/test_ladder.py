"""The parity ladder on SmolLM2's real weights, judged by bitsandbytes, transformers, PEFT and TRL."""

from __future__ import annotations

import pytest

from jaxsloth.parity import l0_nf4, l1_ops, l2_logits, l3_gradients, l4_training, l6_adapters
from jaxsloth.parity.subjects import Subjects


@pytest.fixture(scope="module")
def subjects() -> Subjects:
    return Subjects()


def assert_all(measurements) -> None:
    measured = list(measurements)
    assert measured
    missed = [f"{m.what}: {m.value:.3g} (bar {m.bar:g}, {m.sense}) {m.note}" for m in measured if not m.passed]
    assert not missed, "\n".join(missed)


def test_l0_nf4_is_bitsandbytes(subjects):
    assert_all(l0_nf4.measure(subjects))


def test_l2_logits_are_transformers(subjects):
    assert_all(l2_logits.measure(subjects))


def test_l3_gradients_are_pefts(subjects):
    assert_all(l3_gradients.measure(subjects))


@pytest.mark.slow
def test_l1_ops_are_their_references():
    assert_all(l1_ops.measure())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five minutes on two idle cores
def test_l4_and_l6(subjects):
    """50 steps on each backend and on TRL, with the mutants; then the adapters that came of them change hands."""
    runs = {"torch": l4_training.train(subjects, "torch"), "jax": l4_training.train(subjects, "jax")}
    assert_all(l4_training.measure(subjects, {**runs, "trl": l4_training.train_trl(subjects)}))
    assert_all(l6_adapters.measure(subjects, {name: run.adapter for name, run in runs.items()}))
