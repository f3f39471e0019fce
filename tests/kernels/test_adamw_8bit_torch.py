"""The 8-bit AdamW step in plain torch: against float64, and bit for bit against bitsandbytes' CPU code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from jaxsloth.kernels.adamw_8bit import torch_ops
from jaxsloth.kernels.adamw_8bit.cases import CASES, make_inputs
from jaxsloth.kernels.adamw_8bit.contract import ADAMW_8BIT, Moments
from jaxsloth.kernels.adamw_8bit.torch_ops import adamw_8bit
from jaxsloth.kernels.nf4.contract import dynamic_code
from jaxsloth.kernels.nf4.torch_ops import quantize_dynamic
from jaxsloth.kernels.registry import Target, select
from tests.kernels.adamw_8bit_checks import STATE, check_case, check_free_run_against_bitsandbytes, torch_step

STEP = torch_step(adamw_8bit, "cpu")
signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_reference(case):
    check_case(STEP, case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_slices_change_no_bit(case, monkeypatch):
    inputs, factors = make_inputs(case, 0), np.array([0.9, 1e-2, 0.5], np.float32)
    options = {"sizes": case.sizes, "betas": case.betas, "eps": case.eps}
    whole = STEP(inputs, factors, options)
    monkeypatch.setattr(torch_ops, "SLICE", 512)
    sliced = STEP(inputs, factors, options)
    assert all(np.array_equal(whole[name], sliced[name], equal_nan=True) for name in whole)


def test_fifty_steps_are_bitsandbytes():
    check_free_run_against_bitsandbytes(STEP, share=0.0, gap=0.0)


@signs
def test_the_code_book_is_bitsandbytes(signed):
    assert np.array_equal(dynamic_code(signed=signed), bnb.create_dynamic_map(signed=signed).numpy())


@signs
@pytest.mark.parametrize("size", [65536, 300_077, 100])
def test_quantizing_is_bitsandbytes(signed, size):
    """Every step of the table, and values over twelve decades."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=generator) * 10.0 ** (torch.rand(size, generator=generator) * 12 - 10)
    if size == 65536:
        values = torch.linspace(-1, 1, size, dtype=torch.float64).float()
        values[::256] = 1.0
    values = values if signed else values.abs()
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, torch.from_numpy(dynamic_code(signed=signed)), 256)
    ours, maxima = quantize_dynamic(values, signed)
    assert torch.equal(ours, codes) and torch.equal(maxima, absmax)


def test_what_is_not_a_number_stops_nothing():
    inputs = make_inputs(CASES[0], 0)
    inputs["gradient"][3] = np.nan
    got = STEP(inputs, np.array([1.0, 1e-3, 1.0], np.float32), {"sizes": (4096,), "betas": (0.9, 0.999), "eps": 1e-8})
    assert np.isnan(got["parameter"][3]) and np.isfinite(got["parameter"][256:]).all()


@pytest.mark.parametrize("sizes", [(), (4095,), (2048, 2047, 1), (4096, 0), (4097, -1)])
def test_wrong_sizes(sizes):
    inputs = {name: torch.from_numpy(array) for name, array in make_inputs(CASES[0], 0).items()}
    moments = Moments(**{name: inputs[name] for name in STATE})
    with pytest.raises(ValueError, match="make up the parameter"):
        adamw_8bit(inputs["parameter"], inputs["gradient"], moments, torch.ones(3), sizes=sizes, betas=(0.9, 0.999), eps=1e-8)


def test_the_kernel_is_chosen_on_a_gpu_only():
    assert select(ADAMW_8BIT, "torch", Target("cpu")).implementation.name == "torch"
    assert select(ADAMW_8BIT, "torch", Target("cuda")).implementation.name == "triton"
