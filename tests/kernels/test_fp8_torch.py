"""The 8-bit ops in plain torch against their definition, on the CPU."""

from __future__ import annotations

import pytest
import torch

from jaxsloth.kernels.fp8 import reference, torch_ops
from jaxsloth.kernels.fp8.cases import CASES
from tests.kernels.fp8_checks import (
    NF4_CASES,
    check_margins,
    check_nf4,
    check_not_finite,
    check_product,
    check_quantize,
    check_the_sum_is_what_was_meant,
)
from tests.kernels.torch_checks import DTYPES

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_the_reference_is_torchs_own_e4m3():
    """Every value that there is, every tie between two of them, and what lies just beside a tie."""
    there = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    there = there[there.isfinite()].sort().values
    ties = (there[1:] + there[:-1]) / 2
    values = torch.cat([there, ties, ties * (1 + 2**-20), ties * (1 - 2**-20)])
    assert torch.equal(reference.e4m3(values), values.float().to(torch.float8_e4m3fn).double())
    assert reference.e4m3(torch.tensor([1e4, -449.0])).tolist() == [448.0, -448.0]


@pytest.mark.parametrize("dtype", DTYPES)
@each
def test_quantize_rows(case, dtype):
    check_quantize(torch_ops.quantize_rows, case, dtype, "cpu")


def test_what_is_not_finite_stays_so():
    check_not_finite(torch_ops.quantize_rows, "cpu")


@pytest.mark.parametrize("strided", [False, True])
@each
def test_scaled_product(case, strided):
    check_product(torch_ops.scaled_product, case, "cpu", strided)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", NF4_CASES, ids=lambda case: case.name)
def test_nf4(case, nested, transposed):
    check_nf4(torch_ops.nf4_into, case, nested, transposed, torch.float8_e4m3fn, "cpu")


def test_margins():
    check_margins(torch_ops, torch.float8_e4m3fn, "cpu")


def test_the_sum_is_what_was_meant():
    check_the_sum_is_what_was_meant("cpu", torch_ops.scaled_product, torch_ops.quantize_rows)
