"""Plain torch against the float64 reference, on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.torch_checks import DTYPES, OPS, check_op, every_case, part, relative_error, to_torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), every_case(*OPS), ids=lambda v: getattr(v, "name", v))
def test_against_the_reference(op, case, dtype):
    check_op(op, getattr(part(op, "torch_ops"), op), case, dtype, "cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", part("nf4", "cases").CASES, ids=lambda case: case.name)
def test_dequantize_is_near_the_reference(case, nested):
    inputs = to_torch(part("nf4", "cases").make_inputs(case, 0), "cpu")
    quantized = part("nf4", "torch_ops").quantize(inputs["weight"], nested=nested, offset=inputs["offset"] if nested else None)
    expected = part("nf4", "reference").dequantize(quantized)
    assert relative_error(part("nf4", "torch_ops").dequantize(quantized, torch.float32), expected) <= 1e-6
