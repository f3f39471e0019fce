"""NF4 in torch against bitsandbytes' CPU library: every bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from jaxsloth.kernels.nf4 import torch_ops
from jaxsloth.kernels.nf4.cases import CASES, MATVEC_CASES, make_inputs
from jaxsloth.kernels.nf4.contract import BLOCK, CODE, MATVEC, NESTED_BLOCK, dynamic_code
from jaxsloth.kernels.registry import Target, select
from tests.kernels.torch_checks import DTYPES, bits, check_matvec


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(bits(ours.reshape(-1)), bits(theirs.reshape(-1)))


def check_bit_equal(weight: torch.Tensor, nested: bool) -> None:
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=nested)
    ours = torch_ops.quantize(weight, nested=nested, offset=state.offset if nested else None)
    same(ours.codes, codes)
    same(ours.absmax, state.absmax)
    assert (ours.nested is not None) == nested
    if ours.nested is not None:
        assert state.state2 is not None
        assert state.state2.blocksize == NESTED_BLOCK
        same(ours.nested.absmax, state.state2.absmax)
        same(ours.nested.code, state.state2.code)
        assert ours.nested.offset == state.offset
    for dtype in DTYPES:
        state.dtype = getattr(torch, dtype)
        same(torch_ops.dequantize(ours, state.dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bit_equal_with_bitsandbytes(case, dtype, nested):
    weight = torch.from_numpy(make_inputs(case, 1)["weight"]).to(getattr(torch, dtype))
    # float16 has no room for the widest values; a weight with infinities is refused long before it is quantized.
    check_bit_equal(weight.clamp(-6e4, 6e4), nested)


@pytest.mark.parametrize("nested", [False, True])
def test_slices_join_without_a_seam(monkeypatch, nested):
    monkeypatch.setattr(torch_ops, "SLICE", 4 * BLOCK)
    generator = torch.Generator().manual_seed(0)
    check_bit_equal(torch.randn(37, 62, generator=generator), nested)


def test_many_maxima_by_eight_bits():
    """Enough maxima to meet the steps of bitsandbytes' table that lie near a midpoint."""
    generator = torch.Generator().manual_seed(0)
    check_bit_equal(torch.randn(1024, 4096, generator=generator) * torch.rand(1024, 1, generator=generator), nested=True)


def test_a_weight_that_is_not_contiguous():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    ours, copied = torch_ops.quantize(weight.T), torch_ops.quantize(weight.T.contiguous())
    same(ours.codes, copied.codes)
    same(ours.absmax, copied.absmax)


def test_the_mean_of_the_maxima_is_the_offset_where_none_is_given():
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    _, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    nested = torch_ops.quantize(weight, nested=True).nested
    assert nested is not None and state.offset is not None
    assert abs(nested.offset - state.offset) <= 1e-6 * abs(state.offset)


def test_code_books_are_those_of_bitsandbytes():
    same(torch.from_numpy(CODE), bnb.get_4bit_type("nf4", device="cpu"))
    same(torch.from_numpy(dynamic_code()), bnb.create_dynamic_map())


def test_a_value_that_is_its_own_code_comes_back():
    weight = torch.from_numpy(np.tile(CODE, (4, 4)) * np.float32(0.5))
    same(torch_ops.dequantize(torch_ops.quantize(weight), torch.float32), weight)


def test_an_empty_weight_is_refused():
    with pytest.raises(ValueError, match=r"must hold values.*\(0, 64\)"):
        torch_ops.quantize(torch.empty(0, 64))


def test_an_offset_without_nesting_is_refused():
    with pytest.raises(ValueError, match="nested=True"):
        torch_ops.quantize(torch.ones(1, 64), offset=torch.tensor(1.0))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MATVEC_CASES, ids=lambda case: case.name)
def test_matvec(case, dtype, nested):
    check_matvec(torch_ops.matvec, case, dtype, nested, "cpu")


@pytest.mark.parametrize(
    ("platform", "sizes", "reason"),
    [
        ("cuda", {"rows": 17, "in": 64}, "takes at most 16 rows, and there are 17"),
        ("cuda", {"rows": 1, "in": 96}, "whole blocks of 64 values, and in=96"),
        ("cuda", {"rows": 1, "in": 64, "values": 2**31}, "counts values in 32 bits"),
        ("cpu", {"rows": 1, "in": 64}, "needs an NVIDIA GPU"),
    ],
)
def test_what_the_matvec_kernel_refuses(platform, sizes, reason):
    choice = select(MATVEC, "torch", Target(platform, "bfloat16", sizes))
    assert choice.implementation.name == "torch"
    assert reason in dict(choice.refused)["triton"]


def test_the_matvec_kernel_is_chosen_on_a_gpu():
    assert select(MATVEC, "torch", Target("cuda", "bfloat16", {"rows": 16, "in": 4096})).implementation.name == "triton"
