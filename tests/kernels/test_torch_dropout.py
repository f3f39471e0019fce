"""Dropout masks in torch: the generator against Random123's known answers, the bits against the reference, statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from jaxsloth.kernels.dropout import reference, torch_ops
from jaxsloth.kernels.dropout.cases import CASES, make_inputs
from jaxsloth.kernels.dropout.contract import kept_scale, module_key, threshold
from tests.kernels.torch_checks import to_torch

ONES = 2**32 - 1
# Random123 1.14, tests/kat_vectors, "philox4x32 7": counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_generator_is_random123s(counter, key, words):
    assert reference.philox_4x32(key, counter) == words
    found = torch_ops.philox_4x32(torch.tensor(key), tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in found) == words


def test_ten_rounds_are_curands():
    assert reference.philox_4x32((0, 0), (0, 0, 0, 0), rounds=10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_the_reference(case):
    inputs: dict[str, Any] = make_inputs(case, 1234567890123)
    tensors = to_torch(inputs, "cpu")
    got = torch_ops.keep_mask(tensors["key"], tensors["rows"], case.length, case.channels, rate=case.rate)
    words = tuple(inputs["key"].tolist())
    expected = reference.keep_mask(words, inputs["rows"].tolist(), case.length, case.channels, rate=case.rate)
    np.testing.assert_array_equal(got.numpy(), expected)


def mask(*, seed: int = 0, step: int = 0, module: str = "a", rate: float = 0.1, first: int = 0) -> torch.Tensor:
    key = torch.tensor(module_key(seed, step, module))
    return torch_ops.keep_mask(key, torch.arange(first, first + 8), 64, 512, rate=rate)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_met(rate):
    kept, dropped = mask(rate=rate), threshold(rate) / 2**16
    assert abs(dropped - rate) <= 2**-17 and kept_scale(rate) == pytest.approx(1 / (1 - dropped), rel=1e-15)
    deviation = math.sqrt(dropped * (1 - dropped) / kept.numel())
    assert abs(kept.double().mean().item() - (1 - dropped)) < 5 * deviation


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 2**32}, {"step": 1}, {"module": "b"}, {"first": 8}])
def test_masks_of_different_keys_and_rows_are_independent(other):
    one, two = mask(rate=0.5), mask(rate=0.5, **other)
    assert abs((one == two).double().mean().item() - 0.5) < 5 * math.sqrt(0.25 / one.numel())


# Neighbours of every axis, and channels whose decisions come from one word (64 apart) or one call (128, 448).
@pytest.mark.parametrize(("dim", "apart"), [(0, 1), (1, 1), (2, 1), (2, 64), (2, 128), (2, 448)])
def test_neighbours_are_independent(dim, apart):
    kept = mask(rate=0.5)
    size = kept.shape[dim] - apart
    same = kept.narrow(dim, 0, size) == kept.narrow(dim, apart, size)
    assert abs(same.double().mean().item() - 0.5) < 5 * math.sqrt(0.25 / same.numel())


def test_eight_decisions_of_a_call_take_all_values_equally_often():
    eights = mask(rate=0.5).view(8, 64, 8, 64).movedim(2, 3).reshape(-1, 8).long()
    counts = torch.bincount((eights << torch.arange(8)).sum(dim=1), minlength=256).double()
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_a_row_has_its_mask_wherever_it_stands():
    key = torch.tensor(module_key(0, 0, "a"))
    whole = torch_ops.keep_mask(key, torch.arange(6), 5, 16, rate=0.5)
    torch.testing.assert_close(torch_ops.keep_mask(key, torch.tensor([4, 1]), 5, 16, rate=0.5), whole[[4, 1]])


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        torch_ops.keep_mask(torch.tensor([0, 0]), torch.arange(1), 1, 1, rate=rate)
