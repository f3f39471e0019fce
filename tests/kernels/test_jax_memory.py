"""What the JAX ops keep for their backward, read off the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.kernels.linear_cross_entropy.xla_ops import linear_cross_entropy
from jaxsloth.kernels.lora_matmul.xla_ops import lora_matmul
from jaxsloth.kernels.nf4 import xla_ops
from jaxsloth.kernels.nf4.contract import NF4

WIDTH, TOKENS, RANK = 512, 8, 2
CODE_BYTES = WIDTH * WIDTH // 2


def temporary_bytes(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def stack_of(layers: int) -> NF4:
    one = xla_ops.quantize(jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, WIDTH))))
    return NF4(jnp.stack([one.codes] * layers), jnp.stack([one.absmax] * layers), None, one.shape)


def loss(adapters, stack, x):
    def block(x, scanned):
        layer, (a, b) = scanned
        return x + jnp.tanh(lora_matmul(x, stack, a, b, layer=layer)), None

    layers = stack.codes.shape[0]
    return jax.lax.scan(block, x, (jnp.arange(layers, dtype=jnp.int32), adapters))[0].sum()


@pytest.mark.parametrize("through", [lambda f: f, jax.checkpoint], ids=["plain", "recomputed"])
def test_no_dequantized_weight_is_kept_through_a_scan(through):
    """Eight layers more may not take eight dense weights, nor eight copies of the codes, more."""

    def taken(layers: int) -> int:
        adapters = (jnp.ones((layers, RANK, WIDTH)), jnp.ones((layers, WIDTH, RANK)))
        return temporary_bytes(jax.grad(through(loss)), adapters, stack_of(layers), jnp.ones((TOKENS, WIDTH)))

    a_layer = (taken(10) - taken(2)) / 8
    activations = 4 * TOKENS * WIDTH * 4 + 2 * RANK * WIDTH * 4
    assert a_layer <= activations
    assert activations < CODE_BYTES


@pytest.mark.parametrize("per_token", [False, True])
def test_logits_are_never_whole(per_token):
    tokens, vocab, width, chunk = 512, 4096, 32, 32
    hidden, weight = jnp.ones((tokens, width)), jnp.ones((vocab, width))
    targets = jnp.zeros(tokens, jnp.int32)

    def taken(chunk: int) -> int:
        def total(hidden):
            return linear_cross_entropy(hidden, weight, targets, chunk=chunk, per_token=per_token).sum()

        return temporary_bytes(jax.grad(total), hidden)

    assert taken(chunk) < tokens * vocab * 4 / 2
    assert taken(tokens) >= tokens * vocab * 4
