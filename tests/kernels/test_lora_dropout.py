"""The products behind LoRA's dropout: plain torch, plain JAX and the Pallas kernels on a pass' buffers; lowered for CUDA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsloth.kernels.dropout.torch_ops import keep_mask
from jaxsloth.kernels.lora_dropout import pallas_kernel, torch_ops, xla_ops
from jaxsloth.kernels.lora_dropout.cases import CASES
from jaxsloth.kernels.lora_dropout.contract import TOLERANCES, Masks
from jaxsloth.kernels.lora_matmul.contract import pad_for
from jaxsloth.parity.op_runners import masks_of, prepare
from tests.kernels.lora_dropout_checks import check_products, expected_products
from tests.kernels.torch_checks import relative_error, to_torch
from tests.support.lowering import lowered_for_cuda

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_products(case, dtype):
    check_products(torch_ops, case, dtype, "cpu")


def test_tokens_of_a_batch_have_the_masks_of_keep_mask():
    """Also where they are taken in two parts, as a pass' tiles are."""
    key, rows, words = torch.tensor([5, 6]), torch.tensor([3, 9]), torch.tensor([77, 78])
    masks = Masks(0.4, key, words, (1, 1), rows, 7)
    whole = [keep for _, keep in torch_ops.keeps(masks, 14, 10)]
    for index, word in enumerate((77, 78)):
        own = keep_mask(torch.tensor([5 ^ word, 6]), rows, 7, 10, rate=0.4)
        assert torch.equal(whole[index], own.view(14, 10))
    parts = zip(torch_ops.keeps(masks, 5, 10), torch_ops.keeps(masks.at(5), 9, 10), strict=True)
    for (_, head), (_, tail), expected in zip(*zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([head, tail]), expected)


def check_jax(module, case, interpret: bool) -> None:
    inputs = prepare("lora_dropout", case, "float32")
    masks, rank = masks_of(case, inputs, jnp.asarray), sum(case.ranks)
    pad, tokens = pad_for(rank), case.tokens
    wide = jnp.pad(jnp.asarray(inputs["x"]), ((0, 0), (0, pad)), constant_values=jnp.nan)
    a = jnp.pad(jnp.asarray(inputs["a"]), ((0, pad - rank), (0, 0)), constant_values=jnp.nan)
    g = jnp.pad(jnp.asarray(inputs["dy"]), ((0, 0), (0, pad - rank)), constant_values=jnp.nan)
    stream = np.random.default_rng(1).standard_normal((tokens, case.in_)).astype(np.float32)

    @jax.jit
    def products(masks):
        return (
            module.project(wide, a, masks, interpret=interpret),
            module.input_gradient(jnp.asarray(stream), g, a, masks, interpret=interpret),
            module.gradient_a(g, wide, masks, case.in_, interpret=interpret),
        )

    xa, dx, da = (torch.from_numpy(np.array(array)) for array in products(masks))
    assert (xa[:, rank:] == 0).all()
    expected, dx_expected, da_expected = expected_products(case, to_torch(inputs, "cpu"))
    tolerance = TOLERANCES["float32"]
    assert relative_error(xa[:, :rank], expected) <= tolerance.output
    assert relative_error(dx, torch.from_numpy(stream).double() + dx_expected) <= tolerance.gradient
    assert relative_error(da, da_expected) <= tolerance.gradient


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_xla_products(case):
    check_jax(xla_ops, case, False)


@pytest.mark.parametrize("name", ["group", "odd", "wide_rank"])
def test_pallas_products(name, monkeypatch):
    """Small tiles, so that rows, counters and ranks take several of them."""
    for product in ("PROJECT", "INPUT", "GRADIENT"):
        tiles = getattr(pallas_kernel, product)
        monkeypatch.setattr(pallas_kernel, product, tiles._replace(tokens=16, counters=16, ranks=64, programs=12))
    check_jax(pallas_kernel, BY_NAME[name], True)


@pytest.mark.parametrize(("dtype", "ranks"), [(jnp.bfloat16, (16, 16, 16)), (jnp.float32, (256,)), (jnp.float16, (8, 4))])
def test_pallas_products_lower_for_cuda(dtype, ranks):
    def arrays(*shapes, dtype=dtype):
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    pad, tokens, channels = pad_for(sum(ranks)), 512, 1056
    x, a, g, dx = arrays((tokens, channels + pad), (pad, channels), (tokens, pad), (tokens, channels))
    words = arrays((2,), (len(ranks),), dtype=jnp.uint32)

    def products(x, a, g, dx, key, modules):
        masks = Masks(0.05, key, modules, ranks, jnp.arange(2, dtype=jnp.int32), 256)
        return (
            pallas_kernel.project(x, a, masks),
            pallas_kernel.input_gradient(dx, g, a, masks),
            pallas_kernel.gradient_a(g, x, masks, channels),
        )

    text = lowered_for_cuda(products, x, a, g, dx, *words)
    assert all(f"lora_dropout_{name}" in text for name in ("project", "input", "gradient"))


def test_another_step_needs_no_other_program():
    run = jax.jit(lambda masks: xla_ops.project(jnp.ones((6, 16)), jnp.ones((4, 16)), masks))
    modules, rows = jnp.array([1], jnp.uint32), jnp.arange(2, dtype=jnp.int32)
    found = [np.asarray(run(Masks(0.5, jnp.array([1, step], jnp.uint32), modules, (4,), rows, 3))) for step in range(4)]
    assert run._cache_size() == 1 and len({one.tobytes() for one in found}) > 1
