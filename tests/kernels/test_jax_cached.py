"""Decoding on KV caches in JAX: against float64, in plain XLA and in the interpreter, and lowered for CUDA."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsloth.kernels.attention import pallas_cached, torch_ops, xla_cached
from jaxsloth.kernels.attention.cases import CACHED_CASES, make_cached_inputs
from tests.kernels.torch_checks import judge_cached_attention, to_torch
from tests.support.lowering import lowered_for_cuda

INTERPRETED: tuple[Any, Any] = partial(pallas_cached.append, interpret=True), partial(pallas_cached.attend, interpret=True)
OPS: dict[str, tuple[Any, Any]] = {"xla": (xla_cached.append, xla_cached.attend), "pallas": INTERPRETED}
BY_NAME = {case.name: case for case in CACHED_CASES}


def bits(array) -> np.ndarray:
    found = np.array(array)  # a copy: the array may be donated
    return found.view(f"u{found.dtype.itemsize}")


def tensor(array) -> torch.Tensor:
    to = getattr(torch, jnp.dtype(array.dtype).name)
    return torch.from_numpy(np.array(array.astype(jnp.float32))).to(to)


def check_cached_attention(append, attend, case, dtype: str, repeats: bool) -> None:
    """The torch ops' check of one token, over caches whose every slot that no row sees is no number."""
    inputs = make_cached_inputs(case, 0)
    data = {name: jnp.asarray(inputs[name], dtype) for name in ("q", "k", "v", "keys", "values")}
    tables = None if case.half is None else tuple(jnp.asarray(inputs[name])[:, None] for name in ("cos", "sin"))
    first, slot = jnp.asarray(inputs["first"]), jnp.int32(case.slot)
    slots = np.arange(case.capacity)
    unseen = ((slots < np.array(case.firsts)[:, None]) | (slots >= case.slot))[:, :, None, None]
    caches = [jnp.where(unseen, jnp.nan, data[name]) for name in ("keys", "values")]
    before = [bits(cache) for cache in caches]
    options = {"scale": case.head_dim**-0.5, "window": case.window, "soft_cap": case.soft_cap}

    q, *caches = jax.jit(append, donate_argnums=(4, 5))(data["q"], data["k"], data["v"], tables, *caches, slot)
    attend = jax.jit(partial(attend, **options))
    out, again = (attend(q, *caches, first, slot) for _ in range(2))
    others = slots != case.slot
    for was, cache in zip(before, caches, strict=True):
        assert np.array_equal(bits(cache)[:, others], was[:, others])
    caches = [
        jnp.where(unseen & others[:, None, None], data[name], cache)
        for name, cache in zip(("keys", "values"), caches, strict=True)
    ]
    judge_cached_attention(
        case,
        dtype,
        to_torch(inputs, "cpu"),
        {name: tensor(value) for name, value in data.items()},
        [tensor(value) for value in (q, *caches)],
        [tensor(value) for value in (out, again)],
        repeats,
    )


def every_case() -> list:
    """An interpreted kernel takes seconds to compile: the others of them are slow, and the GPU tests have every dtype."""
    fast = [("many_parts", "float32"), ("soft_cap", "float32"), ("no_rope", "float32"), ("odd_head", "bfloat16")]
    every = [(name, "float32") for name in BY_NAME] + [("full", "bfloat16"), ("odd_head", "bfloat16")]
    return [
        pytest.param(ops, *one, id="-".join((ops, *one)), marks=() if ops == "xla" or one in fast else pytest.mark.slow)
        for ops in OPS
        for one in every
    ]


@pytest.mark.parametrize(("ops", "name", "dtype"), every_case())
def test_against_the_reference(ops, name, dtype):
    check_cached_attention(*OPS[ops], BY_NAME[name], dtype, ops == "pallas")


@pytest.mark.parametrize("ops", OPS)
def test_turned_heads_are_rounded_as_torchs(ops):
    case = BY_NAME["odd_head"]
    inputs = make_cached_inputs(case, 0)
    tensors = to_torch(inputs, "cpu")
    q, k, v, keys, values = (tensors[name].bfloat16() for name in ("q", "k", "v", "keys", "values"))
    torch_ops.append(q, k, v, (tensors["cos"], tensors["sin"]), keys, values, tensors["slot"])
    x, y, z, *caches = (jnp.asarray(inputs[name], jnp.bfloat16) for name in ("q", "k", "v", "keys", "values"))
    tables = jnp.asarray(inputs["cos"]), jnp.asarray(inputs["sin"])
    found = OPS[ops][0](x, y, z, tables, *caches, jnp.int32(case.slot))
    for got, expected in zip(found, (q, keys, values), strict=True):
        assert torch.equal(tensor(got), expected)


def test_one_part_is_all(monkeypatch):
    monkeypatch.setattr(pallas_cached, "MOST_PARTS", 1)
    check_cached_attention(*INTERPRETED, BY_NAME["window"], "float32", True)


@pytest.mark.parametrize("ops", OPS)
def test_a_row_that_sees_nothing_and_a_slot_too_far(ops):
    """Scores in the hundreds, so that a softmax that is not held down overflows; a window of two that ends at the slot."""
    append, attend = OPS[ops]
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(2, heads * 16)), jnp.float32) for heads in (4, 2, 2))
    keys, values = (jnp.asarray(generator.normal(size=(2, 100, 2, 16)), jnp.float32) for _ in range(2))
    first, results = jnp.array([3, 100], jnp.int32), []
    for slot in (jnp.int32(99), jnp.int32(105)):
        _, *caches = append(q, k, v, None, keys, values, slot)
        results.append((*caches, attend(1000 * q, *caches, first, slot, scale=0.25, window=2)))
    for inside, beyond in zip(*results, strict=True):
        assert np.array_equal(inside, beyond)
    out = np.asarray(results[0][-1])
    assert np.isfinite(out).all() and out[0].all() and not out[1].any()


def test_xla_writes_carried_caches_in_place():
    q, k = jnp.ones((2, 64)), jnp.ones((2, 32))
    keys = values = jnp.zeros((2, 2048, 2, 16))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(keys, values, slot):
        def token(caches, offset):
            return xla_cached.append(q, k, k, None, caches[0], caches[1], slot + offset)[1:], None

        return jax.lax.scan(token, (keys, values), jnp.arange(4, dtype=jnp.int32))[0]

    memory = step.lower(keys, values, jnp.int32(3)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * keys.nbytes and memory.temp_size_in_bytes < keys.nbytes / 4


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim"), [(1, 32, 8, 128), (64, 8, 8, 96), (3, 8, 1, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_lowers_for_cuda(dtype, rows, heads, kv_heads, head_dim):
    q, k = (jax.ShapeDtypeStruct((rows, count * head_dim), dtype) for count in (heads, kv_heads))
    table = jax.ShapeDtypeStruct((rows, head_dim // 4), jnp.float32)
    cache = jax.ShapeDtypeStruct((rows, 1000, kv_heads, head_dim), dtype)
    first, scalar = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def step(q, k, v, table, keys, values, first, slot):
        q, keys, values = pallas_cached.append(q, k, v, (table, table), keys, values, slot)
        options = {"scale": 0.1, "window": 300, "soft_cap": 50.0 if head_dim == 256 else None}
        return pallas_cached.attend(q, keys, values, first, slot, **options), keys, values

    text = lowered_for_cuda(step, q, k, k, table, cache, cache, first, scalar)
    assert "cache_append" in text and "cache_attend" in text and "triton" in text
    assert text.count("output_operand_alias<") == 2


def test_what_is_refused():
    q, k = jax.ShapeDtypeStruct((1, 3 * 16), jnp.float32), jax.ShapeDtypeStruct((1, 2 * 16), jnp.float32)
    first, scalar = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    table = jax.ShapeDtypeStruct((1, 9), jnp.float32)

    def cache(capacity, kv_heads=1, head_dim=16):
        return jax.ShapeDtypeStruct((1, capacity, kv_heads, head_dim), jnp.float32)

    for own, message in (
        (cache(2**27), "more than 2147483647: use xla_cached"),
        (cache(8, head_dim=272), "head_dim=272 is over 256"),
        (cache(8, kv_heads=2), "heads \\(3\\) must be a multiple of kv_heads \\(2\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(partial(pallas_cached.attend, scale=1.0), q, own, own, first, scalar)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(pallas_cached.append, q, k, k, None, own, own, scalar)
    with pytest.raises(ValueError, match="turn 18 channels, and a head has 16"):
        jax.eval_shape(pallas_cached.append, q, q, q, (table, table), cache(8), cache(8), scalar)
