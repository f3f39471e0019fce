"""Dropout masks in torch against JAX's own Threefry, and by their statistics."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.random import threefry_2x32

from jaxsloth.kernels.dropout import reference, torch_ops
from jaxsloth.kernels.dropout.cases import CASES, make_inputs
from jaxsloth.kernels.dropout.contract import key_words, threshold
from tests.kernels.torch_checks import to_torch


def judged(case, inputs) -> np.ndarray:
    """The case's mask from JAX's block cipher."""
    counter = np.arange(case.length * case.channels, dtype=np.uint32)
    rows = inputs["rows"].astype(np.uint32)
    first, second = (a.reshape(-1) for a in np.broadcast_arrays(rows[:, None], counter[None, :]))
    # JAX takes the two halves of one array as the first and second words of its counters.
    words = threefry_2x32(jnp.asarray(inputs["key"]), jnp.asarray(np.concatenate([first, second])))
    words = np.asarray(words)[: first.size].reshape(len(rows), case.length, case.channels)
    return words >= np.uint32(threshold(case.rate))


@pytest.mark.parametrize("seed", [0, 1234567890123])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_jax(case, seed):
    inputs = make_inputs(case, seed)
    tensors = to_torch(inputs, "cpu")
    got = torch_ops.keep_mask(tensors["key"], tensors["rows"], case.length, case.channels, rate=case.rate)
    np.testing.assert_array_equal(got.numpy(), judged(case, inputs))


@pytest.mark.parametrize("case", CASES[2:6], ids=lambda case: case.name)
def test_the_reference_has_the_same_bits_as_jax(case):
    inputs: dict[str, Any] = make_inputs(case, 5)
    got = reference.keep_mask(
        tuple(inputs["key"].tolist()), inputs["rows"].tolist(), case.length, case.channels, rate=case.rate
    )
    np.testing.assert_array_equal(got, judged(case, inputs))


def mask(*, seed: int = 0, step: int = 0, module: str = "a", rate: float = 0.1) -> torch.Tensor:
    key = torch.tensor(key_words(seed, step, module))
    return torch_ops.keep_mask(key, torch.arange(8), 64, 512, rate=rate)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_met(rate):
    kept = mask(rate=rate)
    deviation = math.sqrt(rate * (1 - rate) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - rate)) < 5 * deviation


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 2**32}, {"step": 1}, {"module": "b"}])
def test_masks_of_different_keys_are_independent(other):
    one, two = mask(rate=0.5), mask(rate=0.5, **other)
    assert abs((one == two).double().mean().item() - 0.5) < 5 * math.sqrt(0.25 / one.numel())


def test_a_row_has_its_mask_wherever_it_stands():
    key = torch.tensor(key_words(0, 0, "a"))
    whole = torch_ops.keep_mask(key, torch.arange(6), 5, 16, rate=0.5)
    torch.testing.assert_close(torch_ops.keep_mask(key, torch.tensor([4, 1]), 5, 16, rate=0.5), whole[[4, 1]])


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        torch_ops.keep_mask(torch.tensor([0, 0]), torch.arange(1), 1, 1, rate=rate)
