"""NF4 on JAX, bit for bit: quantizing and dequantizing against bitsandbytes, plain and through the Pallas kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional

from jaxsloth.kernels.nf4 import pallas_kernel, xla_ops
from jaxsloth.kernels.nf4.cases import CASES, make_inputs
from jaxsloth.kernels.nf4.contract import NF4, Nested

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


def stacked(nested: bool) -> tuple[NF4, list[NF4]]:
    layers = [xla_ops.quantize(jnp.asarray(np.random.default_rng(i).normal(size=(48, 100))), nested=nested) for i in range(3)]
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


@pytest.mark.parametrize(("weight", "offset", "message"), [((0, 4), None, "must hold values"), ((4, 4), 0.5, "nested=True")])
def test_wrong_input(weight, offset, message):
    given = None if offset is None else jnp.float32(offset)
    with pytest.raises(ValueError, match=message):
        xla_ops.quantize(jnp.zeros(weight), offset=given)


def lowered_for_cuda(function, *arguments) -> str:
    """The program for a GPU, made without one."""
    traced = jax.jit(function).trace(*arguments)
    if jax.__version_info__ < (0, 11):
        return traced.lower(lowering_platforms=("cuda",)).as_text()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@each_level
def test_dequantize_lowers_for_cuda(nested):
    stack, _ = stacked(nested)
    text = lowered_for_cuda(lambda q, i: pallas_kernel.dequantize(q, jnp.bfloat16, layer=i), stack, jnp.int32(1))
    assert "nf4_dequantize" in text and "triton" in text


def test_rms_norm_lowers_for_cuda():
    from jaxsloth.kernels.rms_norm.pallas_kernel import rms_norm

    def both(x, weight):
        return jax.vjp(partial(rms_norm, eps=1e-5), x, weight)[1](x)

    text = lowered_for_cuda(both, jnp.zeros((4, 576), jnp.bfloat16), jnp.ones(576, jnp.bfloat16))
    assert "rms_norm_forward" in text and "rms_norm_backward" in text and "triton" in text
