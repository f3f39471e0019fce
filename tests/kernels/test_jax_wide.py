"""The Pallas kernels over wide arrays: against plain JAX in the interpreter, and lowered for CUDA without a GPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.kernels.gated_activation.pallas_kernel import activate_merged, activate_merged_backward
from jaxsloth.kernels.gated_activation.xla_ops import gated_activation
from jaxsloth.kernels.lora_matmul.contract import PAD, pad_for
from jaxsloth.kernels.lora_matmul.pallas_kernel import (
    MOST,
    GroupLayout,
    append_product,
    backward,
    forward,
    gradients,
    low_rank_gradient,
    pack_adapters,
)
from jaxsloth.kernels.nf4 import xla_ops as nf4
from jaxsloth.kernels.nf4.pallas_kernel import dequantize_rows
from jaxsloth.kernels.rms_norm.pallas_kernel import add_norm, add_norm_backward
from jaxsloth.kernels.rms_norm.xla_ops import rms_norm
from jaxsloth.kernels.rope.pallas_kernel import HeadNorm, Heads, merge, split
from jaxsloth.kernels.rope.pallas_kernel import refuses as rope_refuses
from jaxsloth.kernels.rope.xla_ops import rope
from tests.support.lowering import lowered_for_cuda

BAR = 2e-6  # relative Frobenius, float32 sums of another order


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def poisoned(x: jax.Array, pad: int = PAD) -> jax.Array:
    """The wide array of x, NaN in the pad behind its rows."""
    return jnp.pad(x, ((0, 0), (0, pad)), constant_values=jnp.nan)


def error(got: jax.Array, expected: jax.Array) -> float:
    wide = np.asarray(expected, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - wide) / np.linalg.norm(wide))


@pytest.mark.parametrize(("rows", "width", "pad"), [(1, 64, 64), (37, 192, 64), (33, 1000, 64), (37, 192, 192), (99, 64, 128)])
def test_append_product(rows, width, pad):
    x, matrix = normal(rows, width), normal(pad, width, seed=1)
    got = append_product(poisoned(x, pad), matrix, interpret=True)
    assert jnp.array_equal(got[:, :width], x)
    assert error(got[:, width:], x @ matrix.T) <= BAR


@pytest.mark.parametrize(("rows", "width", "pad"), [(1, 64, 64), (70, 200, 64), (70, 200, 192)])
def test_low_rank_gradient(rows, width, pad):
    x, low = normal(rows, width), normal(rows, 30 + pad, seed=1)
    assert error(low_rank_gradient(x, low, pad, interpret=True), x.T @ low[:, 30:]) <= BAR


@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_rows(nested):
    parts = [nf4.quantize(normal(rows, 128, seed=rows), nested=nested) for rows in (48, 80)]
    shape, first = (48 + 80 + PAD, 128 + PAD), None
    first = dequantize_rows(parts[0], jnp.float32, shape, 0, interpret=True)
    both = dequantize_rows(parts[1], jnp.float32, shape, 48, into=first, interpret=True)
    expected = jnp.concatenate([nf4.dequantize(part, jnp.float32) for part in parts])
    assert jnp.array_equal(both[:128, :128], expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_norm(offset):
    x, delta, weight = normal(9, 96), normal(9, 96, seed=4), normal(96, seed=1)
    along, dy = normal(9, 96, seed=2), normal(9, 96, seed=3)
    total, normed, rstd = add_norm(x, delta, weight, eps=1e-5, offset=offset, pad=PAD, interpret=True)
    assert jnp.array_equal(total, x + delta)
    expected, plain = jax.vjp(lambda x: rms_norm(x, weight, eps=1e-5, offset=offset), x + delta)
    assert error(normed[:, :96], expected) <= BAR
    for got, judge in zip(
        add_norm(total, None, weight, eps=1e-5, offset=offset, pad=PAD, interpret=True)[1:], (normed, rstd), strict=True
    ):
        assert jnp.array_equal(got[..., :96], judge[..., :96])
    dx = add_norm_backward(total, weight, rstd, dy, poisoned(along), offset=offset, interpret=True)
    assert dx.shape == (9, 96 + PAD)
    assert error(dx[:, :96], along + plain(dy)[0]) <= BAR


@pytest.mark.parametrize("norm", [None, HeadNorm(1e-2, 0.0), HeadNorm(1e-6, 1.0)], ids=["plain", "normed", "one more"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (6, 1)])
def test_split_and_merge(heads, kv_heads, norm):
    tokens, dim = 7, 16
    layout = Heads(heads, kv_heads, dim, interpret=True, norm=norm)
    weights = () if norm is None else (normal(dim, seed=7), normal(dim, seed=8))
    qkv, angles = normal(tokens, sum(layout.widths)), normal(tokens, dim // 2, seed=1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    dq, dk, dv = slopes = tuple(normal(tokens, width, seed=2 + place) for place, width in enumerate(layout.widths))

    def plain(qkv):
        q, k, v = jnp.split(qkv, [layout.widths[0], layout.widths[0] + layout.widths[1]], axis=1)
        q, k = (t.reshape(1, tokens, -1, dim) for t in (q, k))
        if norm is not None:
            q, k = (rms_norm(t, w, eps=norm.eps, offset=norm.offset) for t, w in zip((q, k), weights, strict=True))
        return *(rope(t, cos[None], sin[None]).reshape(tokens, -1) for t in (q, k)), v

    expected, plain_pull = jax.vjp(plain, qkv)
    for got, right in zip(split(layout, poisoned(qkv), cos, sin, weights), expected, strict=True):
        assert error(got, right) <= BAR
    dmerged = merge(layout, PAD, dq, dk, dv, cos, sin, poisoned(qkv), weights)
    assert dmerged.shape == (tokens, sum(layout.widths) + PAD)
    assert error(dmerged[:, : sum(layout.widths)], plain_pull(slopes)[0]) <= BAR


def test_split_refuses_what_it_does_not_turn():
    assert rope_refuses(128, 64) is None
    assert "are to be turned" in (rope_refuses(96, 24) or "")
    assert "power of two" in (rope_refuses(96, 48) or "")


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "relu"])
def test_merged_activation(kind):
    gate, up, dh = normal(5, 1100), normal(5, 1100, seed=1), normal(5, 1100, seed=2)
    merged = jnp.concatenate([gate, up], axis=1)
    expected, plain = jax.vjp(lambda gate, up: gated_activation(gate, up, kind=kind), gate, up)
    assert error(activate_merged(merged, 1100, kind, PAD, interpret=True)[:, :1100], expected) <= BAR
    dmerged, h = activate_merged_backward(merged, dh, kind, PAD, interpret=True)
    assert error(dmerged[:, :2200], jnp.concatenate(plain(dh), axis=1)) <= BAR
    assert error(h, expected) <= BAR


@pytest.mark.parametrize("quantized", [(), (0,), (0, 1)])
def test_group(quantized):
    """Two layers of one input, the second without an adapter, whichever of them is quantized, against dense products."""
    dense = [normal(48, 128), normal(80, 128, seed=1)]
    packed = [nf4.quantize(weight) for weight in dense]
    bases = tuple(packed[i] if i in quantized else dense[i] for i in range(2))
    weights = [nf4.dequantize(packed[i], jnp.float32) if i in quantized else dense[i] for i in range(2)]
    a, b, x, dy = normal(8, 128, seed=2), normal(48, 8, seed=3), normal(33, 128, seed=4), normal(33, 128, seed=5)
    group = GroupLayout(128, (48, 80), (8, 0), (2.0, 1.0), PAD, True)

    def plain(x, a, b):
        return jnp.concatenate([x @ weights[0].T + 2.0 * (x @ a.T) @ b.T, x @ weights[1].T], axis=1)

    expected, pull = jax.vjp(plain, x, a, b)
    packed = pack_adapters(group, ((a, b), None), jnp.float32)
    y, low, wide = forward(group, poisoned(x), bases, packed)
    assert error(y, expected) <= BAR
    assert jnp.array_equal(forward(group, poisoned(x), bases, packed, xa=low)[0], y)
    dx, wide_dy = backward(group, poisoned(dy), bases, packed)
    first, second = gradients(group, wide, low, wide_dy)
    assert second is None and first is not None
    for got, judge in zip((dx, *first), pull(dy), strict=True):
        assert error(got, judge) <= BAR


@pytest.mark.parametrize("ranks", [(40, 32), (64, 0), (100, 100)])
def test_wide_groups(ranks):
    """A product of several tiles, one layer's columns ending inside one of them."""
    weights, group = normal(128, 128), GroupLayout(128, (48, 80), ranks, (2.0, 0.5), pad_for(sum(ranks)), True)
    x, dy = normal(33, 128, seed=4), normal(33, 128, seed=5)
    pairs = tuple(
        (normal(rank, 128, seed=rank), normal(out, rank, seed=9)) if rank else None
        for out, rank in zip(group.outs, ranks, strict=True)
    )

    def plain(x, pairs):
        parts = [scale * (x @ pair[0].T) @ pair[1].T for pair, scale in zip(pairs, group.scales, strict=True) if pair]
        return x @ weights.T + jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, 128 - sum(p.shape[1] for p in parts))))

    expected, pull = jax.vjp(plain, x, pairs)
    packed, bases = pack_adapters(group, pairs, jnp.float32), (weights[:48], weights[48:])
    y, low, wide = forward(group, poisoned(x, group.pad), bases, packed)
    dx, wide_dy = backward(group, poisoned(dy, group.pad), bases, packed)
    found = (y, (dx, gradients(group, wide, low, wide_dy)))
    for got, judge in zip(jax.tree.leaves(found), jax.tree.leaves((expected, pull(dy))), strict=True):
        assert error(got, judge) <= BAR


@pytest.mark.parametrize("nested", [None, True])
def test_a_group_without_adapters_has_no_room(nested):
    weights = normal(128, 128)
    base = weights if nested is None else nf4.quantize(weights, nested=nested)
    whole = weights if nested is None else nf4.dequantize(base, jnp.float32)
    group, x = GroupLayout(128, (128,), (0,), (1.0,), 0, True), normal(33, 128, seed=4)
    packed = pack_adapters(group, (None,), jnp.float32)
    y, low, wide = forward(group, x, (base,), packed)
    dx, wide_dy = backward(group, x, (base,), packed)
    assert low is None and wide is x and wide_dy is x
    assert error(y, x @ whole.T) <= BAR and error(dx, x @ whole) <= BAR
    assert gradients(group, wide, low, wide_dy) == (None,)


@pytest.mark.parametrize("rank", [8, 32, 192, MOST])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [64, 8192])  # the columns are shared out among more programs where there are few rows
def test_groups_lower_for_cuda(rank, dtype, rows):
    weights = nf4.quantize(normal(128, 192), nested=True)
    group = GroupLayout(192, (128,), (rank,), (2.0,), pad_for(rank))

    def both(x, dy, a, b):
        packed = pack_adapters(group, ((a, b),), dtype)
        _, low, x = forward(group, x, (weights,), packed)
        dx, dy = backward(group, dy, (weights,), packed)
        return dx, gradients(group, x, low, dy)

    x, dy = (jax.ShapeDtypeStruct((rows, width + group.pad), dtype) for width in (192, 128))
    text = lowered_for_cuda(both, x, dy, normal(rank, 192), normal(128, rank))
    for kernel in ("lora_append", "lora_gradient", "nf4_dequantize_rows"):
        assert kernel in text


def test_everything_else_lowers_for_cuda():
    half = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)

    def block(x, delta, weight, dh):
        total, normed, rstd = add_norm(x, delta, weight, eps=1e-5, offset=0.0, pad=PAD)
        h = activate_merged(normed[:, :192], 96, "silu", PAD)
        dmerged, _ = activate_merged_backward(normed[:, :192], dh, "silu", PAD)
        return h, add_norm_backward(total, weight, rstd, dmerged, normed, offset=0.0)

    text = lowered_for_cuda(block, half((64, 192)), half((64, 192)), normal(192), half((64, 96)))
    for kernel in ("add_rms_norm", "add_rms_norm_backward", "gated_activation", "gated_activation_backward"):
        assert kernel in text

    def attention(merged, tables, weight, norm):
        layout, weights = Heads(32, 8, 128, norm=norm), () if norm is None else (weight, weight)
        heads = split(layout, merged, tables, tables, weights)
        return merge(layout, PAD, *heads, tables, tables, merged, weights)

    for norm in (None, HeadNorm(1e-6, 1.0)):
        text = lowered_for_cuda(partial(attention, norm=norm), half((64, 48 * 128)), normal(64, 64), half((128,)))
        assert "rope_split" in text and "rope_merge" in text
