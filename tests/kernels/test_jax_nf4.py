"""NF4 on JAX, bit for bit: quantizing and dequantizing against bitsandbytes, plain and through the Pallas kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional

from jaxsloth.kernels.nf4 import pallas_kernel, pallas_matvec, xla_ops
from jaxsloth.kernels.nf4.cases import CASES, MATVEC_CASES, make_inputs, make_matvec_inputs
from jaxsloth.kernels.nf4.contract import MATVEC_TOLERANCES, NF4, Nested
from tests.support.lowering import lowered_for_cuda

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_level = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
DTYPES = ("float32", "bfloat16", "float16")
DEQUANTIZE = {"xla": xla_ops.dequantize, "pallas": partial(pallas_kernel.dequantize, interpret=True)}


def judge(weight: np.ndarray, nested: bool):
    return functional.quantize_4bit(torch.from_numpy(weight), compress_statistics=nested, quant_type="nf4")


@every_case
@each_level
def test_quantize_is_bitsandbytes(case, nested):
    weight = make_inputs(case, 0)["weight"]
    codes, state = judge(weight, nested)
    offset = jnp.asarray(state.offset.numpy()) if nested else None
    ours = xla_ops.quantize(jnp.asarray(weight), nested=nested, offset=offset)
    assert np.array_equal(np.asarray(ours.codes), codes.numpy().reshape(-1))
    assert np.array_equal(np.asarray(ours.absmax), state.absmax.numpy())
    if nested:
        assert np.array_equal(np.asarray(ours.nested.absmax), state.state2.absmax.numpy())
        assert np.array_equal(np.asarray(ours.nested.code), state.state2.code.numpy())


@every_case
@each_level
@pytest.mark.parametrize("implementation", DEQUANTIZE)
def test_dequantize_is_bitsandbytes(case, nested, implementation):
    weight = make_inputs(case, 0)["weight"]
    codes, state = judge(weight, nested)
    offset = jnp.asarray(state.offset.numpy()) if nested else None
    quantized = xla_ops.quantize(jnp.asarray(weight), nested=nested, offset=offset)
    # One program for the three dtypes: compiling is what takes the time.
    ours = jax.jit(lambda q: {d: DEQUANTIZE[implementation](q, jnp.dtype(d)) for d in DTYPES})(quantized)
    for dtype in DTYPES:
        state.dtype = getattr(torch, dtype)
        theirs = functional.dequantize_4bit(codes, state).float().numpy()
        assert np.array_equal(np.asarray(ours[dtype].astype(jnp.float32)), theirs), dtype


def stacked(nested: bool, shape: tuple[int, int] = (48, 100)) -> tuple[NF4, list[NF4]]:
    layers = [xla_ops.quantize(jnp.asarray(np.random.default_rng(i).normal(size=shape)), nested=nested) for i in range(3)]
    one = layers[0]
    second = None
    if one.nested is not None:
        second = Nested(
            jnp.stack([q.nested.absmax for q in layers]), jnp.stack([q.nested.offset for q in layers]), one.nested.code
        )
    codes, absmax = jnp.stack([q.codes for q in layers]), jnp.stack([q.absmax for q in layers])
    return NF4(codes, absmax, second, one.shape), layers


@each_level
@pytest.mark.parametrize("implementation", DEQUANTIZE)
def test_a_layer_of_a_stack(nested, implementation):
    stack, layers = stacked(nested)
    for index, one in enumerate(layers):
        got = DEQUANTIZE[implementation](stack, jnp.float32, layer=jnp.int32(index))
        assert np.array_equal(np.asarray(got), np.asarray(xla_ops.dequantize(one, jnp.float32)))


MATVEC = {"xla": xla_ops.matvec, "pallas": partial(pallas_matvec.matvec, interpret=True)}


@pytest.mark.parametrize("case", MATVEC_CASES, ids=lambda case: case.name)
@each_level
@pytest.mark.parametrize("implementation", MATVEC)
def test_matvec(case, nested, implementation):
    check_matvec(MATVEC[implementation], case, nested)


def check_matvec(function, case, nested):
    """Against the float64 product with the dequantized weights."""
    inputs = make_matvec_inputs(case, 0)
    weights = [xla_ops.quantize(jnp.asarray(inputs[f"weight{i}"]), nested=nested) for i in range(len(case.outs))]
    dense = np.concatenate([np.asarray(xla_ops.dequantize(weight, jnp.float32), np.float64) for weight in weights])
    for dtype in ("float32", "bfloat16"):
        x = jnp.asarray(inputs["x"]).astype(dtype)
        got = function(x, weights)
        expected = np.asarray(x.astype(jnp.float32), np.float64) @ dense.T
        error = np.linalg.norm(np.asarray(got.astype(jnp.float32)) - expected) / np.linalg.norm(expected)
        assert got.dtype == x.dtype and error <= MATVEC_TOLERANCES[dtype].output, (dtype, error)


@each_level
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("implementation", MATVEC)
def test_matvec_of_a_layer_of_a_stack(nested, rows, implementation):
    found = [stacked(nested, (out, 512)) for out in (48, 16)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 512)), jnp.float32)
    for index in range(len(found[0][1])):
        got = MATVEC[implementation](x, [stack for stack, _ in found], layer=jnp.int32(index))
        expected = xla_ops.matvec(x, [layers[index] for _, layers in found])
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("split", [1, 2, 4])
def test_matvec_in_parts(rows, split):
    weight = xla_ops.quantize(jnp.asarray(np.random.default_rng(1).normal(size=(40, 1024)), jnp.float32), nested=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 1024)), jnp.float32)
    tiles = pallas_matvec.Tiles(16, 2, split, 2)
    got = pallas_matvec.matvec(x, [weight], tiles=tiles, interpret=True)
    np.testing.assert_allclose(np.asarray(got), np.asarray(xla_ops.matvec(x, [weight])), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="16 blocks must be whole steps"):
        pallas_matvec.matvec(x, [weight], tiles=pallas_matvec.Tiles(16, 3, split, 2), interpret=True)


@pytest.mark.parametrize(("weight", "offset", "message"), [((0, 4), None, "must hold values"), ((4, 4), 0.5, "nested=True")])
def test_wrong_input(weight, offset, message):
    given = None if offset is None else jnp.float32(offset)
    with pytest.raises(ValueError, match=message):
        xla_ops.quantize(jnp.zeros(weight), offset=given)


@each_level
def test_dequantize_lowers_for_cuda(nested):
    stack, _ = stacked(nested)
    text = lowered_for_cuda(lambda q, i: pallas_kernel.dequantize(q, jnp.bfloat16, layer=i), stack, jnp.int32(1))
    assert "nf4_dequantize" in text and "triton" in text


@each_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8])
def test_matvec_lowers_for_cuda(nested, dtype, rows):
    stack, _ = stacked(nested, (48, 1152))
    x = jnp.zeros((rows, 1152), dtype)
    text = lowered_for_cuda(lambda x, q, i: pallas_matvec.matvec(x, [q, q], layer=i), x, stack, jnp.int32(1))
    assert "nf4_matvec" in text and "triton" in text and "shfl.sync.idx" in text


def test_rms_norm_lowers_for_cuda():
    from jaxsloth.kernels.rms_norm.pallas_kernel import rms_norm

    def both(x, weight):
        return jax.vjp(partial(rms_norm, eps=1e-5), x, weight)[1](x)

    text = lowered_for_cuda(both, jnp.zeros((4, 576), jnp.bfloat16), jnp.ones(576, jnp.bfloat16))
    assert "rms_norm_forward" in text and "rms_norm_backward" in text and "triton" in text
