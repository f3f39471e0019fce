"""Greedy decoding as one program a burst of tokens, its layers one after the other.

Same mathematics as layers.py for one token a row. NF4 layers that share their input are one `nf4_matvec`, their adapters two
small products beside it, from copies in the compute dtype that a burst makes once. Rotation and cache write are one op and so
is the attention over the slots; both know the caches of each layer by itself, which a burst updates in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.layers import Attention, Block, Cache, Linear
from jaxsloth.jax_backend.train_step import rates_of
from jaxsloth.kernels.attention import pallas_cached, xla_cached
from jaxsloth.kernels.jax_platform import platform, precision_of


@jax.jit
def split(caches: Sequence[Cache]) -> list[Cache]:
    """Each layer's caches ``[batch, capacity, kv_heads, head_dim]`` from those stacked by place in the period."""
    return [Cache(one.keys[i], one.values[i]) for i in range(caches[0].keys.shape[0]) for one in caches]


@partial(jax.jit, static_argnames=("period",))
def stacked(caches: Sequence[Cache], period: int) -> tuple[Cache, ...]:
    """The inverse of `split`."""
    return tuple(jax.tree.map(lambda *layers: jnp.stack(layers), *caches[place::period]) for place in range(period))


@partial(jax.jit, static_argnames=("structure", "ropes", "count"), donate_argnums=(2,))
def say(
    trained: Any, frozen: Any, caches: list[Cache], state: Any, frequencies: Any, structure: Any, ropes: Any, count: int
) -> tuple[Any, Any, Any]:
    """(the `count` likeliest tokens that follow state["tokens"], int32 ``[batch, count]``, the state behind them, the caches).

    state: tokens int32 ``[batch]``, yet to be appended; positions int32 ``[batch, 1]``, theirs; first int32 ``[batch]``, each
    row's first slot that counts; slot int32, the one to be written. Nothing of it waits for the host.
    """
    decoder = nnx.merge(structure, trained, frozen)
    blocks = tuple(decoder.model.layers)
    adapters = [[_adapters(linears, decoder.dtype) for linears in block.groups()] for block in blocks]
    layers, norm = nnx.split(decoder.model.layers), decoder.model.norm

    def step(carried: Any, _: Any) -> Any:
        caches, state = carried
        x = decoder.model.embed_tokens.weight[...][state["tokens"]].astype(decoder.dtype)
        if decoder.spec.embedding.scale != 1.0:
            x = x * jnp.asarray(decoder.spec.embedding.scale, decoder.dtype)
        found = decoder.rope_tables(state["positions"], rates_of(ropes, frequencies))
        ropes_of = [layer.attention.rope for layer in decoder.spec.layers[: len(blocks)]]
        tables = [None if rope is None else tuple(table[:, 0] for table in found[rope]) for rope in ropes_of]
        delta, written, period = jnp.zeros_like(x), [], len(blocks)
        # A burst may go on past the tokens that are wanted, and past the end: as XLA's updates do, the last slot takes them.
        slot = jnp.minimum(state["slot"], caches[0].keys.shape[1] - 1)
        for index in range(len(caches) // period):
            own = caches[index * period : (index + 1) * period]
            x, delta, own = _period(*layers, x, delta, tables, own, adapters, state["first"], slot, jnp.int32(index))
            written += own
        said = jnp.argmax(decoder.logits(norm(x + delta)), axis=-1).astype(jnp.int32)
        after = {"tokens": said, "positions": state["positions"] + 1, "first": state["first"], "slot": state["slot"] + 1}
        return (written, after), said

    (caches, state), said = jax.lax.scan(step, (caches, state), None, length=count)
    return said.T, state, caches


# A function of its own under jit: layers that follow one another are traced and lowered once instead of each.
@partial(jax.jit, static_argnums=(0,))
def _period(
    structure: Any,
    arrays: Any,
    x: Any,
    delta: Any,
    tables: Any,
    caches: Sequence[Cache],
    adapters: Any,
    first: Any,
    slot: Any,
    index: Any,
) -> tuple[Any, Any, list[Cache]]:
    """One repetition of the period: the residual stream comes and goes as x and what is yet to be added to it."""
    written = []
    for place, block in enumerate(nnx.merge(structure, arrays)):
        own = [None if pair is None else tuple(each[index] for each in pair) for pair in adapters[place]]
        x, delta, cache = _block(block, own, x, delta, tables[place], caches[place], first, slot, index)
        written.append(cache)
    return x, delta, written


def _block(
    block: Block, adapters: Any, x: Any, delta: Any, tables: Any, cache: Cache, first: Any, slot: Any, index: Any
) -> tuple[Any, Any, Cache]:
    qkv, out, gate_up, down = block.groups()
    x = x + delta
    normed = block.input_layernorm(x, index) if block._normed else x
    projected = _products(qkv, normed, adapters[0], index)
    attended, cache = _attend(block.self_attn, projected, tables, cache, first, slot, index)
    attended = _products(out, attended, adapters[1], index)
    if block._sandwich:
        x = x + block.post_attention_layernorm(attended, index)
        normed = block.pre_feedforward_layernorm(x, index)
    else:
        x = x + attended
        normed = block.post_attention_layernorm(x, index)
    gate, up = jnp.split(_products(gate_up, normed, adapters[2], index), 2, axis=-1)
    h = block.mlp._ops.gated_activation(gate, up, kind=block.mlp._spec.activation)
    fed = _products(down, h, adapters[3], index)
    return x, block.post_feedforward_layernorm(fed, index) if block._sandwich else fed, cache


def _attend(
    attention: Attention, projected: Any, tables: Any, cache: Cache, first: Any, slot: Any, index: Any
) -> tuple[Any, Cache]:
    spec, rows = attention._spec, projected.shape[0]
    width = spec.heads * spec.head_dim
    q, k, v = jnp.split(projected, [width, width + spec.kv_heads * spec.head_dim], axis=-1)
    if spec.qk_norm is not None:
        q, k = (
            norm(t.reshape(rows, -1, spec.head_dim), index).reshape(rows, -1)
            for norm, t in ((attention.q_norm, q), (attention.k_norm, k))
        )
    module = _cached(cache)
    q, keys, values = module.append(q, k, v, tables, cache.keys, cache.values, slot)
    out = module.attend(q, keys, values, first, slot, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap)
    return out, Cache(keys, values)


def _cached(cache: Cache) -> ModuleType:
    refused = pallas_cached.refuses(cache.keys.size, cache.keys.shape[-1])
    return pallas_cached if platform() == "cuda" and refused is None else xla_cached


def _adapters(linears: list[Linear], dtype: Any) -> tuple[Any, Any] | None:
    """(A ``[layers, r, in]``, B times its scale ``[layers, r, out]``) of all layers of a group in one, or None."""
    adapted = [one for one in linears if one._adapted]
    if not adapted:
        return None
    b, column, outs = [], 0, sum(one._shape[0] for one in linears)
    for one in linears:
        if one._adapted:
            own = (one._scale * one.lora_B[...]).astype(dtype).swapaxes(1, 2)
            b.append(jnp.pad(own, ((0, 0), (0, 0), (column, outs - column - one._shape[0]))))
        column += one._shape[0]
    return jnp.concatenate([one.lora_A[...].astype(dtype) for one in adapted], axis=1), jnp.concatenate(b, axis=1)


def _products(linears: list[Linear], x: Any, adapters: Any, index: Any) -> Any:
    """``[batch, in] -> [batch, sum of out]``."""
    bases = [one.base() for one in linears]
    levels = {one._nested if one._quantized else None for one in linears}
    widest = max(one._shape[0] for one in linears)
    matvec = None
    if len(levels) == 1 and linears[0]._quantized:
        matvec = linears[0]._ops.matvec(x.shape[0], (widest, x.shape[1]))
    if matvec is not None:
        y = matvec(x, bases, layer=index)
    else:
        parts = [one._ops.lora_matmul(x, base, layer=index) for one, base in zip(linears, bases, strict=True)]
        y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    if adapters is not None:
        a, b = adapters
        precision = precision_of(x.dtype)
        low = jnp.einsum("ti,ri->tr", x, a, precision=precision)
        y = y + jnp.einsum("tr,ro->to", low, b, precision=precision)
    if not linears[0]._biased:  # all of a group have one, or none
        return y
    return y + jnp.concatenate([one.bias[...][index].astype(y.dtype) for one in linears])
