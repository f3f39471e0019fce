"""The loss's softmax in Pallas: the whole op by it against float64 in the interpreter, and lowered for CUDA without a GPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxsloth.kernels.linear_cross_entropy import pallas_kernel, xla_ops
from jaxsloth.kernels.linear_cross_entropy.cases import CASES
from jaxsloth.kernels.linear_cross_entropy.contract import LINEAR_CROSS_ENTROPY
from tests.kernels.test_jax_ops import check
from tests.support.lowering import lowered_for_cuda


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(xla_ops, "platform", lambda: "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_reference(case, monkeypatch, as_on_cuda):
    """In tiles of 32 columns, so that most vocabularies take several and end inside one."""
    monkeypatch.setattr(pallas_kernel, "SIZE", 1024 if case.vocab > 1000 else 32)
    monkeypatch.setattr(xla_ops, "softmax", partial(pallas_kernel.softmax, interpret=True))
    check(LINEAR_CROSS_ENTROPY, case, "float32", "xla")


@pytest.mark.parametrize("per_token", [False, True])
def test_a_loss_alone_writes_no_gradient(per_token, as_on_cuda):
    """XLA keeps all that a kernel writes, so it must not be asked for."""
    hidden, weight, targets = jnp.zeros((32, 64)), jnp.zeros((1000, 64)), jnp.zeros(32, jnp.int32)
    loss = partial(xla_ops.linear_cross_entropy, chunk=16, per_token=per_token)
    text = str(jax.make_jaxpr(loss)(hidden, weight, targets))
    assert "softmax_loss" in text and "input_output_aliases=()" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_it_lowers_for_cuda(dtype, soft_cap, as_on_cuda):
    hidden, weight = (jax.ShapeDtypeStruct((rows, 64), jnp.dtype(dtype)) for rows in (40, 1000))
    loss = partial(xla_ops.linear_cross_entropy, chunk=16, soft_cap=soft_cap)
    text = lowered_for_cuda(jax.grad(loss), hidden, weight, jax.ShapeDtypeStruct((40,), jnp.int32))
    assert "softmax_loss" in text and "triton" in text
    # In the logits' own memory where the gradient is as wide as they are.
    assert ("output_operand_aliases = [#" in text) == (dtype == "float32")
    assert "softmax_loss" in lowered_for_cuda(loss, hidden, weight, jax.ShapeDtypeStruct((40,), jnp.int32))
