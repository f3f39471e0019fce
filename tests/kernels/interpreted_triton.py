"""The Triton kernels under Triton's interpreter, on the CPU; test_triton.py runs this file with TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.language import core
from triton.runtime import interpreter

from jaxsloth.kernels.adamw_8bit import triton_kernel as adamw_8bit_triton
from jaxsloth.kernels.attention import flash_triton, library_ops
from jaxsloth.kernels.fp8 import triton_kernel as fp8_triton
from jaxsloth.kernels.gumbel import reference as gumbel_reference
from jaxsloth.kernels.gumbel import triton_kernel as gumbel_triton
from jaxsloth.kernels.lora_dropout import triton_kernel as lora_dropout_triton
from jaxsloth.kernels.nf4 import matvec_triton
from jaxsloth.kernels.nf4 import triton_kernel as nf4_triton
from tests.kernels.adamw_8bit_checks import check_case, check_each_step_against_bitsandbytes, torch_step
from tests.kernels.fp8_checks import NF4_CASES, check_margins, check_nf4, check_values_before_the_cast
from tests.kernels.lora_dropout_checks import check_products
from tests.kernels.torch_checks import (
    DTYPES,
    check_cached_attention,
    check_dequantize,
    check_matvec,
    check_op,
    every_case,
    part,
    prepare,
    relative_error,
    to_torch,
)

WITH_KERNELS = ("rms_norm", "layer_norm", "rope", "gated_activation", "linear_cross_entropy")
MANY = 32  # blocks in a program of 8-bit AdamW, where its own four would be interpreted in thousands of programs


@pytest.fixture(autouse=True, scope="module")
def one_search_of_the_language():
    """Triton looks through all of its language for what to replace at every call in a kernel: a quarter of the time.

    What there is to replace is remembered here.
    """

    @functools.cache
    def names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names(package):
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


def as_the_interpreter_rounds(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Triton's interpreter cuts float32 off to bfloat16; compiled code rounds to nearest, which the gpu tests see."""
    if dtype == torch.bfloat16:
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


# bfloat16 is left to the compile gate and the gpu tests: cut off twice, a value misses a bar that is made for rounding. float16
# takes the same way through a kernel: an op's first case shows its casts, and the gpu tests have them all.
@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [
        pytest.param(op, case, dtype, id=f"{op}-{case.name}-{dtype}")
        for op in WITH_KERNELS
        for place, (_, case) in enumerate(every_case(op))
        for dtype in (("float32", "float16") if place == 0 else ("float32",))
    ],
)
def test_against_the_reference(op, case, dtype):
    check_op(op, getattr(part(op, "triton_kernel"), op), case, dtype, "cpu")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", part("nf4", "cases").CASES, ids=lambda case: case.name)
def test_dequantize(case, dtype, nested):
    check_dequantize(nf4_triton.dequantize, case, dtype, nested, "cpu", as_the_interpreter_rounds)


@pytest.mark.parametrize(
    ("case", "dtype", "nested"),
    [
        pytest.param(case, dtype, nested, id=f"{case.name}-{dtype}-{nested}")
        for place, case in enumerate(part("nf4", "cases").MATVEC_CASES)
        for dtype, nested in ((("float32", False), ("float16", True)) if place == 0 else ()) + (("float32", True),)
    ],
)
def test_matvec(case, dtype, nested):
    check_matvec(matvec_triton.matvec, case, dtype, nested, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", part("attention", "cases").CACHED_CASES, ids=lambda case: case.name)
def test_cached_attention(case, dtype):
    check_cached_attention(part("attention", "triton_kernel"), case, dtype, "cpu")


@pytest.mark.parametrize("case", part("attention", "cases").CASES, ids=lambda case: case.name)
def test_flash_attention(case, monkeypatch):
    """Long cases have the kernel's own tiles; in small ones the short cases too meet tiles that are whole, cut and skipped.

    A head and a row are programs of their own: what the short cases are about is met with one group of heads and two rows, and
    "grouped", "packed" and "decode_left_padded" have more.
    """
    long = case.q_length > 100
    if not long:
        if case.name not in ("grouped", "packed", "decode_left_padded"):
            case = replace(case, batch=min(case.batch, 2), heads=case.heads // case.kv_heads, kv_heads=1)
        tiles = tuple(flash_triton.Tiles(*sizes, 1, 1) for sizes in ((16, 16), (8, 16), (16, 8)))
        monkeypatch.setattr(flash_triton, "tiles_for", lambda *_: tiles)
    check_op("attention", flash_triton.attention, case, "float16" if long else "float32", "cpu")


@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_passs_way_to_flash(packed):
    """Rows of the merged projection in, the output and the gradients out, as autograd through plain torch has them."""
    name = "window_soft_cap_packed" if packed else "soft_cap"
    case = next(case for case in part("attention", "cases").CASES if case.name == name)
    inputs = prepare("attention", case, "float32", "cpu")
    tokens = case.batch * case.q_length
    merged = torch.cat([inputs[each].reshape(tokens, -1) for each in ("q", "k", "v")], dim=1)
    own = case.head_dim * case.kv_heads
    q, k, v = merged.split([merged.shape[1] - 2 * own, own, own], dim=1)
    segments = inputs["q_segments"] if packed else torch.ones(case.batch, case.q_length, dtype=torch.int32)
    bounds = library_ops.boundaries_of(segments.numpy())
    layout = library_ops.Layout(
        case.batch, case.q_length, segments, None if bounds is None else torch.from_numpy(bounds), case.q_length
    )
    shape = (case.heads, case.kv_heads, case.head_dim, case.head_dim**-0.5, True, case.window, case.soft_cap)
    plain = part("attention", "torch_ops").attention
    results = []
    for settings in (library_ops.AttentionSettings(*shape, plain, flash_triton), library_ops.AttentionSettings(*shape, plain)):
        out, stats = library_ops.forward(q, k, v, settings, layout)
        assert len(stats) == (1 if settings.kernel is not None else 0)
        dout = inputs["dy"].reshape(out.shape)
        results.append((out, *library_ops.backward(dout, q, k, v, out, stats, settings, layout)))
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape and relative_error(got, expected) <= 5e-6


@pytest.mark.parametrize("case", part("lora_dropout", "cases").CASES, ids=lambda case: case.name)
def test_lora_dropout(case, monkeypatch):
    """Small tiles, so that few tokens take several of them."""
    for product in ("PROJECT", "INPUT", "GRADIENT"):
        tiles = getattr(lora_dropout_triton, product)
        monkeypatch.setattr(lora_dropout_triton, product, tiles._replace(tokens=32, ranks=64, programs=12))
    check_products(lora_dropout_triton, case, "float16" if case.name == "group" else "float32", "cpu")


@pytest.mark.parametrize("case", part("adamw_8bit", "cases").CASES, ids=lambda case: case.name)
def test_adamw_8bit(case, monkeypatch):
    if case.name == "many_blocks":
        monkeypatch.setattr(adamw_8bit_triton, "TILE", MANY)
    check_case(torch_step(adamw_8bit_triton.adamw_8bit, "cpu"), case)


def test_adamw_8bit_is_bitsandbytes(monkeypatch):
    monkeypatch.setattr(adamw_8bit_triton, "TILE", MANY)
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


@pytest.mark.parametrize("case", part("gumbel", "cases").CASES, ids=lambda case: case.name)
def test_gumbel_draws(case):
    inputs = part("gumbel", "cases").make_inputs(case, 77)
    got = gumbel_triton.draw(*to_torch(inputs, "cpu").values(), vocab=case.vocab)
    assert got.tolist() == gumbel_reference.draw(*inputs.values(), vocab=case.vocab).tolist()
