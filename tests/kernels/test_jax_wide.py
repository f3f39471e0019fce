"""The Pallas kernels over wide arrays: against plain JAX in the interpreter, and lowered for CUDA without a GPU."""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.kernels.gated_activation.pallas_kernel import gated_merged
from jaxsloth.kernels.gated_activation.xla_ops import gated_activation
from jaxsloth.kernels.lora_matmul.pallas_kernel import ROOM, Group, append_product, lora_group, low_rank_gradient
from jaxsloth.kernels.nf4 import xla_ops as nf4
from jaxsloth.kernels.nf4.pallas_kernel import dequantize_rows
from jaxsloth.kernels.rms_norm.pallas_kernel import norm_fork
from jaxsloth.kernels.rms_norm.xla_ops import rms_norm
from jaxsloth.kernels.rope.pallas_kernel import Heads, split_heads
from jaxsloth.kernels.rope.pallas_kernel import refuses as rope_refuses
from jaxsloth.kernels.rope.xla_ops import rope
from tests.kernels.test_jax_nf4 import lowered_for_cuda

BAR = 2e-6  # relative Frobenius, float32 sums of another order


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def poisoned(x: jax.Array) -> jax.Array:
    """The wide array of x, NaN in the room behind its rows."""
    return jnp.pad(x, ((0, 0), (0, ROOM)), constant_values=jnp.nan)


def error(got: jax.Array, expected: jax.Array) -> float:
    wide = np.asarray(expected, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - wide) / np.linalg.norm(wide))


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (37, 192), (33, 1000)])
def test_append_product(rows, width):
    x, matrix = normal(rows, width), normal(ROOM, width, seed=1)
    got = append_product(poisoned(x), matrix, interpret=True)
    assert jnp.array_equal(got[:, :width], x)
    assert error(got[:, width:], x @ matrix.T) <= BAR


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (70, 200)])
def test_low_rank_gradient(rows, width):
    x, low = normal(rows, width), normal(rows, 30 + ROOM, seed=1)
    assert error(low_rank_gradient(x, low, interpret=True), x.T @ low[:, 30:]) <= BAR


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_rows(nested):
    parts = [nf4.quantize(normal(rows, 128, seed=rows), nested=nested) for rows in (48, 80)]
    shape, first = (48 + 80 + ROOM, 128 + ROOM), None
    first = dequantize_rows(parts[0], jnp.float32, shape, 0, interpret=True)
    both = dequantize_rows(parts[1], jnp.float32, shape, 48, into=first, interpret=True)
    expected = jnp.concatenate([nf4.dequantize(part, jnp.float32) for part in parts])
    assert jnp.array_equal(both[:128, :128], expected)


def test_norm_fork():
    x, weight, along, dy = normal(9, 96), normal(96, seed=1), normal(9, 96, seed=2), normal(9, 96, seed=3)
    both, pull = jax.vjp(lambda x: norm_fork(x, weight, 1e-5, 0.0, ROOM, True), poisoned(x))
    expected, plain = jax.vjp(lambda x: rms_norm(x, weight, eps=1e-5), x)
    stream, normed = cast("tuple[jax.Array, jax.Array]", both)
    assert jnp.array_equal(stream[:, :96], x)
    assert error(normed[:, :96], expected) <= BAR
    (dx,) = pull((poisoned(along), poisoned(dy)))
    assert error(dx[:, :96], along + plain(dy)[0]) <= BAR


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (6, 1)])
def test_split_heads(heads, kv_heads):
    tokens, dim = 7, 16
    layout = Heads(heads, kv_heads, dim, interpret=True)
    qkv, angles = normal(tokens, sum(layout.widths)), normal(tokens, dim // 2, seed=1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    slopes = [normal(tokens, width, seed=2 + place) for place, width in enumerate(layout.widths)]

    def plain(qkv):
        q, k, v = jnp.split(qkv, [layout.widths[0], layout.widths[0] + layout.widths[1]], axis=1)
        turned = (rope(t.reshape(1, tokens, -1, dim), cos[None], sin[None]).reshape(t.shape) for t in (q, k))
        return *turned, v

    found, pull = jax.vjp(lambda merged: split_heads(layout, ROOM, merged, cos, sin), poisoned(qkv))
    expected, plain_pull = jax.vjp(plain, qkv)
    for got, right in zip(cast("tuple[jax.Array, ...]", found), cast("tuple[jax.Array, ...]", expected), strict=True):
        assert error(got, right) <= BAR
    dmerged = pull(tuple(slopes))[0]
    assert dmerged.shape == (tokens, sum(layout.widths) + ROOM)
    assert error(dmerged[:, : sum(layout.widths)], plain_pull(tuple(slopes))[0]) <= BAR


def test_split_heads_refuses_what_it_does_not_turn():
    assert rope_refuses(128, 64) is None
    assert "are to be turned" in (rope_refuses(96, 24) or "")
    assert "power of two" in (rope_refuses(96, 48) or "")


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "relu"])
def test_gated_merged(kind):
    gate, up, dh = normal(5, 1100), normal(5, 1100, seed=1), normal(5, 1100, seed=2)
    merged = poisoned(jnp.concatenate([gate, up], axis=1))
    forward, pull = jax.vjp(lambda merged: gated_merged(merged, 1100, kind, ROOM, True), merged)
    expected, plain = jax.vjp(lambda gate, up: gated_activation(gate, up, kind=kind), gate, up)
    h = cast(jax.Array, forward)
    assert error(h[:, :1100], expected) <= BAR
    (dmerged,) = pull(poisoned(dh))
    assert error(dmerged[:, :2200], jnp.concatenate(plain(dh), axis=1)) <= BAR


def test_everything_lowers_for_cuda():
    half = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    weights = nf4.quantize(normal(128, 192), nested=True)
    group = Group(192, (128,), (8,), (2.0,))
    for rows in (64, 8192):  # the columns are shared out among more programs where there are few rows

        def trained(x, a, b):
            return lora_group(group, x, (weights,), ((a, b),), None, None).astype(jnp.float32).sum()

        text = lowered_for_cuda(jax.grad(trained, argnums=(0, 1, 2)), half((rows, 192 + ROOM)), normal(8, 192), normal(128, 8))
        for kernel in ("lora_append", "lora_gradient", "nf4_dequantize_rows"):
            assert kernel in text

    def block(x, weight):
        stream, normed = cast("tuple[jax.Array, jax.Array]", norm_fork(x, weight, 1e-5, 0.0, ROOM, False))
        return stream.astype(jnp.float32).sum() + gated_merged(normed, 96, "silu", ROOM, False).astype(jnp.float32).sum()

    text = lowered_for_cuda(jax.grad(block), half((64, 192 + ROOM)), normal(192))
    for kernel in ("rms_norm_fork", "rms_norm_fork_backward", "gated_activation", "gated_activation_backward"):
        assert kernel in text

    def attention(merged, tables):
        q, k, v = cast("tuple[jax.Array, ...]", split_heads(Heads(32, 8, 128), ROOM, merged, tables, tables))
        return (q.astype(jnp.float32) ** 2).sum() + (k * v).astype(jnp.float32).sum()

    text = lowered_for_cuda(jax.grad(attention), half((64, 48 * 128 + ROOM)), normal(64, 64))
    assert "rope_split" in text and "rope_merge" in text
