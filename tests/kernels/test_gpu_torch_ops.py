"""Every torch implementation of every op on an NVIDIA GPU: the body of test_torch_ops.py, and sizes that only fit there."""

from __future__ import annotations

import pytest
import torch

from jaxsloth.kernels.adamw_8bit.cases import CASES as ADAMW_CASES
from jaxsloth.kernels.adamw_8bit.contract import ADAMW_8BIT, Moments, blocks_of, step_factors
from jaxsloth.kernels.attention.cases import CACHED_CASES, CachedCase
from jaxsloth.kernels.dropout.cases import CASES as DROPOUT_CASES
from jaxsloth.kernels.dropout.cases import make_inputs as make_dropout_inputs
from jaxsloth.kernels.dropout.torch_ops import keep_mask
from jaxsloth.kernels.gumbel import torch_ops as gumbel_torch
from jaxsloth.kernels.gumbel import triton_kernel as gumbel_triton
from jaxsloth.kernels.gumbel.cases import CASES as GUMBEL_CASES
from jaxsloth.kernels.gumbel.cases import Case as GumbelCase
from jaxsloth.kernels.gumbel.cases import make_inputs as make_gumbel_inputs
from jaxsloth.kernels.lora_dropout import triton_kernel as lora_dropout_triton
from jaxsloth.kernels.lora_dropout.cases import CASES as LORA_DROPOUT_CASES
from jaxsloth.kernels.lora_dropout.cases import Case as LoraDropoutCase
from jaxsloth.kernels.nf4 import torch_ops as nf4_torch
from jaxsloth.kernels.nf4.cases import CASES as NF4_CASES
from jaxsloth.kernels.nf4.cases import MATVEC_CASES, MatvecCase
from jaxsloth.kernels.nf4.cases import make_inputs as make_nf4_inputs
from jaxsloth.kernels.nf4.contract import BLOCK, DEQUANTIZE, MATVEC, NESTED_BLOCK, NF4, Nested, dynamic_code
from jaxsloth.kernels.registry import Target, select
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from jaxsloth.parity.op_runners import masks_of
from tests.kernels.adamw_8bit_checks import STATE, check_case, check_each_step_against_bitsandbytes, torch_step
from tests.kernels.lora_dropout_checks import check_products
from tests.kernels.torch_checks import (
    DTYPES,
    OPS,
    bits,
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


LONG_CACHE = CachedCase("long", 9000, 8500, (0, 8000, 17), heads=32, kv_heads=8, head_dim=128, half=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CACHED_CASES, LONG_CACHE], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["triton_kernel", "torch_ops"])
def test_cached_attention(name, case, dtype):
    check_cached_attention(part("attention", name), case, dtype, "cuda")


# The shapes of Llama-3.1-8B: qkv, gate and up, and down.
MODEL_CASES = [
    MatvecCase(f"{rows}x{in_}", rows, in_, outs)
    for rows in (1, 8)
    for in_, outs in ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)))
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*MATVEC_CASES, *MODEL_CASES], ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", MATVEC.of("torch"), ids=lambda implementation: implementation.name)
def test_matvec(implementation, case, dtype, nested):
    check_matvec(implementation.load(), case, dtype, nested, "cuda")


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


@pytest.mark.parametrize(
    "case",
    [*GUMBEL_CASES, GumbelCase("large", 3, 128256), GumbelCase("list", 300, 128256, listed=256)],
    ids=lambda case: case.name,
)
def test_gumbel_draws_are_those_of_the_cpu(case):
    inputs = make_gumbel_inputs(case, 5)
    expected = gumbel_torch.draw(*to_torch(inputs, "cpu").values(), vocab=case.vocab)
    assert torch.equal(gumbel_triton.draw(*to_torch(inputs, "cuda").values(), vocab=case.vocab).cpu(), expected)


LARGE_DROPOUT = LoraDropoutCase("large", (3, 1), 1000, 3072, (16, 16, 16), rate=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*LORA_DROPOUT_CASES, LARGE_DROPOUT], ids=lambda case: case.name)
def test_lora_dropout_products(case, dtype):
    """The large case against plain torch, whose masks are those of the CPU."""
    if case is not LARGE_DROPOUT:
        check_products(lora_dropout_triton, case, dtype, "cuda")
        return
    inputs = prepare("lora_dropout", case, dtype, "cuda")
    masks = masks_of(case, inputs, lambda value: value)
    a, found = inputs["a"].to(inputs["x"].dtype), []
    for module in (lora_dropout_triton, part("lora_dropout", "torch_ops")):
        total = torch.zeros_like(inputs["a"])
        xa = module.project(inputs["x"], a, masks)
        dx = module.input_gradient(torch.zeros_like(inputs["x"]), inputs["dy"], a, masks)
        module.gradient_a(inputs["dy"], inputs["x"], masks, total.split(list(case.ranks)))
        found.append((xa, dx, total))
    tolerance = part("lora_dropout", "contract").TOLERANCES[dtype].output
    assert all(relative_error(got, expected) <= tolerance for got, expected in zip(*found, strict=True))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("window", "packed"), [(None, False), (300, False), (None, True), (200, True)])
def test_flash_attention_of_long_rows(head_dim, window, packed):
    """Half precision at a model's length, against plain torch in float32 on the same values; twice, to the same bits."""
    shape, options = (2, 1000), {"scale": head_dim**-0.5, "window": window, "soft_cap": 20.0}
    if packed:
        options["q_segments"] = (torch.arange(1000, device="cuda", dtype=torch.int32) // 170 + 1).expand(shape).contiguous()
    q, k, v = (torch.randn(*shape, heads, head_dim, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    dy = torch.randn_like(q)

    def run(function, *leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = function(*leaves, **options)
        return [out, *torch.autograd.grad(out, leaves, dy.to(out.dtype))]

    flash = part("attention", "flash_triton").attention
    first, second = run(flash, q, k, v), run(flash, q, k, v)
    judge = run(part("attention", "torch_ops").attention, q.float(), k.float(), v.float())
    tolerance = part("attention", "contract").TOLERANCES["bfloat16"]
    for index, (got, again, expected) in enumerate(zip(first, second, judge, strict=True)):
        assert torch.equal(got, again)
        assert relative_error(got, expected) <= (tolerance.gradient if index else tolerance.output)


def test_the_kernels_are_chosen_here():
    for op in (DEQUANTIZE, RMS_NORM, ADAMW_8BIT):
        assert select(op, "torch", Target(platform="cuda", dtype="bfloat16")).implementation.name == "triton"


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


each_adamw = pytest.mark.parametrize("implementation", ADAMW_8BIT.of("torch"), ids=lambda implementation: implementation.name)


@each_adamw
@pytest.mark.parametrize("case", ADAMW_CASES, ids=lambda case: case.name)
def test_adamw_8bit(implementation, case):
    check_case(torch_step(implementation.load(), "cuda"), case)


@each_adamw
def test_adamw_8bit_is_bitsandbytes_on_a_cpu(implementation):
    check_each_step_against_bitsandbytes(torch_step(implementation.load(), "cuda"))


def adamw_arguments(sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    """A parameter, its gradient, and moments of zeros, on the GPU."""
    n, blocks = sum(sizes), sum(blocks_of(size) for size in sizes)
    parameter, gradient = (torch.randn(n, device="cuda") for _ in range(2))
    codes, absmax = torch.zeros(n, dtype=torch.uint8, device="cuda"), torch.zeros(blocks, device="cuda")
    return parameter, gradient, Moments(codes, absmax, codes.clone(), absmax.clone())


@each_adamw
def test_adamw_8bit_in_a_graph(implementation):
    """One graph serves every step: rate and count are read from the device."""
    sizes, betas, function = (4096, 5000), (0.9, 0.999), implementation.load()
    parameter, gradient, moments = adamw_arguments(sizes)
    rates = [torch.tensor(step_factors(1e-3 / count, count, betas, 0.1), device="cuda") for count in (1, 2, 3)]
    eager, factors = parameter.clone(), torch.zeros(3, device="cuda")
    state = Moments(*(getattr(moments, name).clone() for name in STATE))
    for rate in rates:
        function(eager, gradient, state, rate, sizes=sizes, betas=betas, eps=1e-8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(parameter, gradient, moments, factors, sizes=sizes, betas=betas, eps=1e-8)
    for rate in rates:
        factors.copy_(rate)
        graph.replay()
    assert torch.equal(parameter, eager)
    assert all(torch.equal(getattr(moments, name), getattr(state, name)) for name in STATE)


def test_adamw_8bit_beyond_int32_offsets():
    function, last = ADAMW_8BIT.of("torch")[0].load(), 5000
    sizes, options = (2**31 + 77, last), {"betas": (0.9, 0.999), "eps": 1e-8}
    parameter, gradient, moments = adamw_arguments(sizes)
    factors = torch.tensor(step_factors(1e-3, 1, options["betas"], 0.1), device="cuda")
    blocks = blocks_of(last)
    own = Moments(*(getattr(moments, name)[-(blocks if "absmax" in name else last) :].clone() for name in STATE))
    expected, _ = function(parameter[-last:].clone(), gradient[-last:], own, factors, sizes=(last,), **options)
    function(parameter, gradient, moments, factors, sizes=sizes, **options)
    assert torch.equal(parameter[-last:], expected)
    assert torch.equal(moments.exp_avg[-last:], own.exp_avg)
    assert torch.equal(moments.exp_avg_sq_absmax[-blocks:], own.exp_avg_sq_absmax)
