"""The Triton kernels under Triton's interpreter, on the CPU; test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from jaxsloth.kernels.adamw_8bit import triton_kernel as adamw_8bit_triton
from jaxsloth.kernels.fp8 import triton_kernel as fp8_triton
from jaxsloth.kernels.nf4 import matvec_triton
from jaxsloth.kernels.nf4 import triton_kernel as nf4_triton
from tests.kernels.adamw_8bit_checks import check_case, check_each_step_against_bitsandbytes, torch_step
from tests.kernels.fp8_checks import NF4_CASES, check_margins, check_nf4, check_values_before_the_cast
from tests.kernels.torch_checks import (
    DTYPES,
    check_cached_attention,
    check_dequantize,
    check_matvec,
    check_op,
    every_case,
    part,
)

WITH_KERNELS = ("rms_norm", "rope", "gated_activation", "linear_cross_entropy")


def as_the_interpreter_rounds(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Triton's interpreter cuts float32 off to bfloat16; compiled code rounds to nearest, which the gpu tests see."""
    if dtype == torch.bfloat16:
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


# bfloat16 is left to the compile gate and the gpu tests: cut off twice, a value misses a bar that is made for rounding.
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("op", "case"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}") for pair in every_case(*WITH_KERNELS)]
)
def test_against_the_reference(op, case, dtype):
    check_op(op, getattr(part(op, "triton_kernel"), op), case, dtype, "cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", part("nf4", "cases").CASES, ids=lambda case: case.name)
def test_dequantize(case, dtype, nested):
    check_dequantize(nf4_triton.dequantize, case, dtype, nested, "cpu", as_the_interpreter_rounds)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", part("nf4", "cases").MATVEC_CASES, ids=lambda case: case.name)
def test_matvec(case, dtype, nested):
    check_matvec(matvec_triton.matvec, case, dtype, nested, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", part("attention", "cases").CACHED_CASES, ids=lambda case: case.name)
def test_cached_attention(case, dtype):
    check_cached_attention(part("attention", "triton_kernel"), case, dtype, "cpu")


@pytest.mark.parametrize("case", part("adamw_8bit", "cases").CASES, ids=lambda case: case.name)
def test_adamw_8bit(case):
    check_case(torch_step(adamw_8bit_triton.adamw_8bit, "cpu"), case)


def test_adamw_8bit_is_bitsandbytes():
    check_each_step_against_bitsandbytes(torch_step(adamw_8bit_triton.adamw_8bit, "cpu"))


# The interpreter's own cast to e4m3 neither rounds up across a power of two nor saturates. Casts are left to the gpu tests, and
# what the kernels are about to cast is looked at here.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", part("fp8", "cases").CASES, ids=lambda case: case.name)
def test_fp8_quantize_rows(case, dtype):
    check_values_before_the_cast(fp8_triton.quantize_rows_into, case, dtype, "cpu")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", NF4_CASES, ids=lambda case: case.name)
def test_fp8_nf4(case, nested, transposed):
    check_nf4(fp8_triton.nf4_into, case, nested, transposed, torch.float32, "cpu")


def test_fp8_margins():
    check_margins(fp8_triton, torch.float32, "cpu")
