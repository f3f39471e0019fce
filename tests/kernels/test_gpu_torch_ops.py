"""Every torch implementation of every op on an NVIDIA GPU: the body of test_torch_ops.py, and sizes that only fit there."""

from __future__ import annotations

import pytest
import torch

from jaxsloth.kernels.dropout.cases import CASES as DROPOUT_CASES
from jaxsloth.kernels.dropout.cases import make_inputs as make_dropout_inputs
from jaxsloth.kernels.dropout.torch_ops import keep_mask
from jaxsloth.kernels.nf4 import torch_ops as nf4_torch
from jaxsloth.kernels.nf4.cases import CASES as NF4_CASES
from jaxsloth.kernels.nf4.cases import make_inputs as make_nf4_inputs
from jaxsloth.kernels.nf4.contract import BLOCK, DEQUANTIZE, NESTED_BLOCK, NF4, Nested, dynamic_code
from jaxsloth.kernels.registry import Facts, select
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from tests.kernels.torch_checks import DTYPES, OPS, bits, check_dequantize, check_op, every_case, part, relative_error, to_torch

pytestmark = pytest.mark.gpu


def every_implementation() -> list:
    return [
        pytest.param(op, implementation, case, id=f"{op}-{implementation.name}-{case.name}")
        for op, case in every_case(*OPS)
        for implementation in part(op, "contract").OPS[0].of("torch")
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "implementation", "case"), every_implementation())
def test_against_the_reference(op, implementation, case, dtype):
    check_op(op, implementation.load(), case, dtype, "cuda")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NF4_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", DEQUANTIZE.of("torch"), ids=lambda implementation: implementation.name)
def test_dequantize(implementation, case, dtype, nested):
    check_dequantize(implementation.load(), case, dtype, nested, "cuda")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", NF4_CASES, ids=lambda case: case.name)
def test_quantize_is_that_of_the_cpu(case, nested):
    quantized = []
    for device in ("cpu", "cuda"):
        inputs = to_torch(make_nf4_inputs(case, 0), device)
        quantized.append(nf4_torch.quantize(inputs["weight"], nested=nested, offset=inputs["offset"] if nested else None))
    here, there = quantized
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(bits(here.absmax), bits(there.absmax).cpu())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours, theirs = nf4_torch.dequantize(here, dtype), nf4_torch.dequantize(there, dtype)
        assert torch.equal(bits(ours), bits(theirs).cpu())


@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda case: case.name)
def test_dropout_masks_are_those_of_the_cpu(case):
    masks = []
    for device in ("cpu", "cuda"):
        inputs = to_torch(make_dropout_inputs(case, 0), device)
        masks.append(keep_mask(inputs["key"], inputs["rows"], case.length, case.channels, rate=case.rate).cpu())
    assert torch.equal(*masks)


def test_the_kernels_are_chosen_here():
    for op in (DEQUANTIZE, RMS_NORM):
        assert select(op, "torch", Facts(platform="cuda", dtype="bfloat16")).implementation.name == "triton"


@pytest.mark.parametrize("implementation", RMS_NORM.of("torch"), ids=lambda implementation: implementation.name)
def test_rms_norm_of_a_hundred_thousand_rows(implementation):
    x = torch.randn(100_003, 576, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(576, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    y = implementation.load()(x, weight, eps=1e-5)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = part("rms_norm", "reference").rms_norm(wide, wide_weight, eps=1e-5)
    tolerance = part("rms_norm", "contract").TOLERANCES["bfloat16"]
    assert relative_error(y, expected) <= tolerance.output
    found = torch.autograd.grad(y, (x, weight), dy)
    for got, reference in zip(found, torch.autograd.grad(expected, (wide, wide_weight), dy.double()), strict=True):
        assert relative_error(got, reference) <= tolerance.gradient


@pytest.mark.parametrize("implementation", RMS_NORM.of("torch")[:1], ids=lambda implementation: implementation.name)
def test_rms_norm_beyond_int32_offsets(implementation):
    rows, hidden = 2**20 + 5, 2049
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16)
    function = implementation.load()
    y = function(x, weight, eps=1e-5)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    tail = x.detach()[-7:].clone().requires_grad_()
    expected = function(tail, weight, eps=1e-5)
    assert torch.equal(y[-7:], expected)
    assert torch.equal(dx[-7:], torch.autograd.grad(expected, tail, expected.detach())[0])


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_beyond_int32_offsets(nested):
    rows, columns, tail = 2**21 + NESTED_BLOCK, 1024, NESTED_BLOCK
    blocks = rows * columns // BLOCK
    codes = torch.randint(0, 256, (rows * columns // 2,), device="cuda", dtype=torch.uint8)
    code = torch.from_numpy(dynamic_code()).cuda()
    outer = torch.rand(blocks // NESTED_BLOCK, device="cuda")
    absmax = torch.randint(0, 256, (blocks,), device="cuda", dtype=torch.uint8) if nested else torch.rand(blocks, device="cuda")

    def quantized(last: int) -> NF4:
        """The last rows alone."""
        own = last * columns // BLOCK
        second = Nested(outer[-own // NESTED_BLOCK :], torch.tensor(0.25, device="cuda"), code) if nested else None
        return NF4(codes[-last * columns // 2 :], absmax[-own:], second, (last, columns))

    whole = DEQUANTIZE.of("torch")[0].load()(quantized(rows), torch.bfloat16)
    assert torch.equal(whole[-tail:], nf4_torch.dequantize(quantized(tail), torch.bfloat16))
