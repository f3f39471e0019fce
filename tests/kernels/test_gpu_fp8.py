"""The 8-bit ops and the pass that uses them on an NVIDIA GPU with products of e4m3."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxsloth.backend import BuildOptions, OptimizerOptions
from jaxsloth.kernels.fp8 import library_ops, reference, torch_ops
from jaxsloth.kernels.fp8 import triton_kernel as fp8_triton
from jaxsloth.kernels.fp8.cases import CASES
from jaxsloth.kernels.fp8.contract import NF4_INTO, QUANTIZE_ROWS, SCALED_PRODUCT, Rows
from jaxsloth.kernels.nf4.cases import Case as Nf4Case
from jaxsloth.kernels.registry import Target, select
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.torch_backend import fp8
from jaxsloth.torch_backend.written_program import WrittenProgram
from tests.kernels.fp8_checks import (
    NF4_CASES,
    check_margins,
    check_nf4,
    check_not_finite,
    check_product,
    check_quantize,
    check_the_sum_is_what_was_meant,
    nearest,
    nf4_inputs,
)
from tests.kernels.torch_checks import DTYPES, relative_error
from tests.models.test_gpu_passes import MODES, WIDE
from tests.support.small_models import VOCAB, build
from tests.support.sources import examples, first_batch, stream

pytestmark = pytest.mark.gpu
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
FUSED = {"train_pass": "fused"}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [fp8_triton.quantize_rows, torch_ops.quantize_rows], ids=["triton", "torch"])
@each
def test_quantize_rows(case, function, dtype):
    check_quantize(function, case, dtype, "cuda")


def test_what_is_not_finite_stays_so():
    check_not_finite(fp8_triton.quantize_rows, "cuda")


@pytest.mark.parametrize("strided", [False, True])
@each
def test_scaled_product(case, strided):
    check_product(library_ops.scaled_product, case, "cuda", strided)


@pytest.mark.parametrize(("tokens", "out", "in_"), [(8192, 4096, 4160), (4096, 28672, 4160), (300, 6144, 2112), (64, 192, 640)])
def test_rows_that_lie_apart_are_written_as_contiguous_ones(tokens, out, in_):
    """The result goes to rows with room behind them, whichever way the library turns a product of this size."""
    a, b = (torch_ops.quantize_rows(torch.randn(rows, in_, device="cuda").bfloat16()) for rows in (tokens, out))
    whole = torch.empty(tokens, out, device="cuda", dtype=torch.bfloat16)
    wide = torch.full((tokens, out + 64), 7.0, device="cuda", dtype=torch.bfloat16)
    library_ops.scaled_product(a, b, None, whole)
    library_ops.scaled_product(a, b, None, wide[:, :out])
    assert relative_error(wide[:, :out], whole) <= 1e-3 and (wide[:, out:] == 7.0).all()
    part = Rows(a.values[-7:], a.scales[-7:])
    few = torch.empty(7, out, device="cuda", dtype=torch.bfloat16)
    torch_ops.scaled_product(part, b, None, few)
    assert relative_error(whole[-7:], few) <= 4e-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", [*NF4_CASES, Nf4Case("large", 1040, 4096)], ids=lambda case: case.name)
def test_nf4(case, nested, transposed):
    check_nf4(fp8_triton.nf4_into, case, nested, transposed, torch.float8_e4m3fn, "cuda")
    quantized, inverse = nf4_inputs(case, nested, transposed, "cuda")
    shape = (case.in_, case.out) if transposed else (case.out, case.in_)
    ours, theirs = (torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda") for _ in range(2))
    fp8_triton.nf4_into(quantized, inverse, ours, transposed=transposed)
    torch_ops.nf4_into(quantized, inverse, theirs, transposed=transposed)
    assert (as_bytes(ours) != as_bytes(theirs)).float().mean() <= 1e-4


def test_margins():
    check_margins(fp8_triton, torch.float8_e4m3fn, "cuda")


def test_the_sum_is_what_was_meant():
    check_the_sum_is_what_was_meant("cuda", library_ops.scaled_product, fp8_triton.quantize_rows)


def test_a_hundred_thousand_rows():
    x = torch.randn(100_003, 576, device="cuda", dtype=torch.bfloat16)
    rows, scales = fp8_triton.quantize_rows(x), reference.quantize_rows(x)[1]
    torch.testing.assert_close(rows.scales.double(), scales, rtol=3e-7, atol=0)
    nearest(rows.values, x.double() / scales)


def test_the_kernels_are_chosen_here():
    names = [
        select(op, "torch", Target("cuda", "bfloat16")).implementation.name for op in (QUANTIZE_ROWS, NF4_INTO, SCALED_PRODUCT)
    ]
    assert names == ["triton", "triton", "library"]


def gradients(mode="none", nested=True, **changes):
    options = BuildOptions(dtype="bfloat16", gradient_checkpointing=mode, implementations=FUSED, **changes)
    return build("torch", WIDE, nested=nested, options=options)[0].gradients(first_batch(stream(examples(8, VOCAB))))


@pytest.mark.parametrize("nested", [None, False, True], ids=["dense", "nf4", "nested"])
@pytest.mark.parametrize("keeps", [False, True])
def test_the_pass_is_that_of_plain_torch(monkeypatch, nested, keeps):
    """With every 8-bit kernel replaced. Results that differ by bfloat16's rounding are quantized to other values now and then:
    the two passes are apart by a part of e4m3's own noise."""
    monkeypatch.setattr(WrittenProgram, "_keeps_weights", keeps)
    loss, ours = gradients(nested=nested, compute="fp8")
    monkeypatch.setattr(fp8, "kernels_of", lambda device: torch_ops)
    monkeypatch.setattr(fp8, "product_of", lambda device: torch_ops)
    expected, theirs = gradients(nested=nested, compute="fp8")
    assert loss == pytest.approx(expected, rel=5e-3)
    assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= 0.3


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_near_the_exact_pass(mode):
    expected, theirs = gradients(mode)
    loss, ours = gradients(mode, compute="fp8")
    assert loss == pytest.approx(expected, rel=2e-2)
    flat, reference = (np.concatenate([found[name].ravel() for name in theirs]).astype(np.float64) for found in (ours, theirs))
    assert np.linalg.norm(flat - reference) <= 0.35 * np.linalg.norm(reference)


@pytest.mark.parametrize("mode", ["none", "offload"])
def test_graphs_replay_what_they_recorded(mode):
    """As the exact pass' test: eager first, then recorded, then replayed; adapters move enough for margins to need factors."""
    losses = []
    for captures in (True, False):
        options = BuildOptions(dtype="bfloat16", gradient_checkpointing=mode, implementations=FUSED, compute="fp8")
        model, *_ = build("torch", WIDE, nested=True, options=options)
        step = model.step(CausalLoss(), OptimizerOptions(weight_decay=0.1))
        if not captures:
            model.written_program()._stretches = True
        step_batches = [stream(examples(16, VOCAB), batch_size=size).batch(place) for size in (4, 2) for place in (0, 1)]
        found = [
            step(step_batch, learning_rate=1e-2, step=place, seed=0).floats()[0]
            for place, step_batch in enumerate(step_batches * 3)
        ]
        assert (model.written_program().captured >= 2) == captures
        losses.append(found)
    assert np.allclose(*losses, rtol=0, atol=2e-2) and losses[0][8] < losses[0][0]
