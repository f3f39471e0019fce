"""Every JAX implementation of every op against its float64 reference: one body, all cases and dtypes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.kernels.attention.xla_ops import attention
from jaxsloth.kernels.dropout.cases import CASES as DROPOUT_CASES
from jaxsloth.kernels.dropout.cases import make_inputs as make_dropout_inputs
from jaxsloth.kernels.dropout.torch_ops import keep_mask as torch_keep_mask
from jaxsloth.kernels.dropout.xla_ops import keep_mask
from jaxsloth.kernels.embedding_noise.xla_ops import threefry_2x32
from jaxsloth.kernels.layer_norm import pallas_kernel as layer_norm_pallas
from jaxsloth.kernels.linear_cross_entropy.xla_ops import linear_cross_entropy
from jaxsloth.kernels.lora_matmul.contract import Dropout
from jaxsloth.kernels.lora_matmul.xla_ops import lora_matmul
from jaxsloth.kernels.registry import Implementation, Op, Target, all_ops
from jaxsloth.parity.l1_ops import error
from jaxsloth.parity.op_runners import ARGUMENTS, part, prepare, run_jax, run_reference
from tests.support.lowering import lowered_for_cuda

DTYPES = ("float32", "bfloat16", "float16")
PALLAS_NORMS = ("rms_norm", "layer_norm")
OPS = {op.name: op for op in all_ops() if op.name in ARGUMENTS}


class Interpreted(Implementation):
    """A Pallas kernel as JAX's interpreter runs it."""

    def load(self):
        return partial(super().load(), interpret=True)


def check(op: Op, case, dtype: str, requested: str, platform: str = "cpu") -> None:
    inputs = prepare(op.name, case, dtype)
    tolerance = part(op.name, "contract").TOLERANCES[dtype]
    got = run_jax(op, case, inputs, Target(platform, dtype), requested)
    for name, expected in run_reference(op.name, case, inputs).items():
        bar = tolerance.output if name == "output" else tolerance.gradient
        assert error(got[name], expected) <= bar, f"{name}: {error(got[name], expected):.2e} over {bar}"


def every_case():
    return [pytest.param(name, case, id=f"{name}-{case.name}") for name in OPS for case in part(name, "cases").CASES]


@pytest.mark.parametrize("dtype", DTYPES[:2])  # float16 takes the same code; the GPU tests have it
@pytest.mark.parametrize(("name", "case"), every_case())
def test_xla_against_the_reference(name, case, dtype):
    check(OPS[name], case, dtype, "xla")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case.name}") for name in PALLAS_NORMS for case in part(name, "cases").CASES],
)
def test_pallas_norms_interpreted(name, case, dtype):
    path = f"jaxsloth.kernels.{name}.pallas_kernel:{name}"
    check(Op(name, (Interpreted("interpreted", "jax", path),)), case, dtype, "interpreted")


@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_lowers_for_cuda(biased):
    x, weight = jax.ShapeDtypeStruct((600, 384), jnp.bfloat16), jax.ShapeDtypeStruct((384,), jnp.float32)

    def loss(x, weight, bias):
        return layer_norm_pallas.layer_norm(x, weight, bias, eps=1e-12).astype(jnp.float32).sum()

    text = lowered_for_cuda(jax.grad(loss, argnums=(0, 1, 2) if biased else (0, 1)), x, weight, weight if biased else None)
    assert "layer_norm_forward" in text and "layer_norm_backward" in text and "triton" in text


@pytest.mark.parametrize("case", DROPOUT_CASES, ids=lambda case: case.name)
def test_dropout_masks_are_torchs(case):
    import torch

    inputs = make_dropout_inputs(case, 0)
    ours = keep_mask(
        jnp.asarray(inputs["key"], jnp.uint32), jnp.asarray(inputs["rows"]), case.length, case.channels, rate=case.rate
    )
    theirs = torch_keep_mask(
        torch.from_numpy(inputs["key"].astype(np.int64)),
        torch.from_numpy(inputs["rows"]),
        case.length,
        case.channels,
        rate=case.rate,
    )
    assert np.array_equal(np.asarray(ours), theirs.numpy())


def test_threefry_is_jaxs():
    from jax.extend.random import threefry_2x32 as judge

    key = jnp.array([123456789, 987654321], jnp.uint32)
    counter = jnp.arange(64, dtype=jnp.uint32)
    expected = judge(key, counter)
    first, second = threefry_2x32(key, counter[:32], counter[32:])
    assert np.array_equal(np.concatenate([first, second]), np.asarray(expected))


def test_a_dropout_step_needs_no_other_program():
    mask = jax.jit(lambda key: keep_mask(key, jnp.arange(2, dtype=jnp.int32), 3, 5, rate=0.5))
    masks = [np.asarray(mask(jnp.array([step, 7], jnp.uint32))) for step in range(8)]
    assert mask._cache_size() == 1
    assert len({m.tobytes() for m in masks}) > 1


def test_a_layer_of_a_dense_stack():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 7)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 7)), jnp.float32)

    def value_and_gradient(x, base, layer):
        return jax.value_and_grad(lambda x: (lora_matmul(x, base, layer=layer) ** 2).sum())(x)

    for index in range(3):
        stacked = jax.jit(value_and_gradient)(x, stack, jnp.int32(index))
        single = jax.jit(lambda x, base: value_and_gradient(x, base, None))(x, stack[index])
        for got, expected in zip(stacked, single, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_traced_offset_is_the_plain_one():
    q, k, v = (jnp.asarray(np.random.default_rng(i).normal(size=(1, n, 2, 8)), jnp.float32) for i, n in enumerate((1, 9, 9)))
    traced = jax.jit(lambda offset: attention(q, k, v, scale=0.3, window=3, q_offset=offset))
    for offset in (0, 4, 8):
        expected = attention(q, k, v, scale=0.3, window=3, q_offset=offset)
        np.testing.assert_allclose(traced(jnp.int32(offset)), expected, rtol=0, atol=1e-6)  # of values around 1
    assert traced._cache_size() == 1


def heads(count: int, length: int = 4):
    return jnp.ones((1, length, count, 8))


SEGMENTS = jnp.ones((1, 4), jnp.int32)
DROPOUT = Dropout(0.5, jnp.zeros(2, jnp.uint32), jnp.zeros(1, jnp.int32))
WRONG = {
    "heads": (lambda: attention(heads(3), heads(2), heads(2), scale=1.0), "multiple of kv_heads"),
    "no q_segments": (lambda: attention(heads(2), heads(2), heads(2), scale=1.0, kv_segments=SEGMENTS), "without q_segments"),
    "lengths": (
        lambda: attention(heads(2), heads(2, 6), heads(2, 6), scale=1.0, q_segments=SEGMENTS),
        "can't stand for 6 keys",
    ),
    "half an adapter": (lambda: lora_matmul(jnp.ones((2, 4)), jnp.ones((3, 4)), jnp.ones((1, 4))), "both or neither"),
    "flat dropout": (
        lambda: lora_matmul(jnp.ones((2, 4)), jnp.ones((3, 4)), dropout=DROPOUT),
        "must be \\[batch, length, in\\]",
    ),
    "chunk": (
        lambda: linear_cross_entropy(jnp.ones((2, 4)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32), chunk=-1),
        "chunk must be positive",
    ),
    "rate": (lambda: keep_mask(DROPOUT.key, DROPOUT.rows, 2, 2, rate=1.0), "in \\[0, 1\\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
