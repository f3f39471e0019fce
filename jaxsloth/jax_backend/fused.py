"""The blocks of a pre-norm decoder for training, forward and backward written out.

Same mathematics as layers.py. The linear layers that share an input are one product each way with their adapters as extra
columns (kernels/lora_matmul/pallas_kernel.py), norms take the residual sum along, gate and up are one array, and what is kept
for the backward is said here instead of being found by tracing. x1 and x2 are the residual stream before attention and MLP:

    none       x1, x2, both norms' outputs, q k v, attention's output and statistics, gate and up
    selective  x1, x2, q k v, attention's output and statistics; norms, gate and up are formed again
    offload    the same, in pinned host memory, fetched a layer ahead
    full       x1, x2, attention's output and statistics

In every mode the products with A, as wide as the groups' rooms, are kept too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxsloth.jax_backend.block_pass import DOWN, OUT, BlockPass, Kind, Pass, Tree, ropes_of
from jaxsloth.jax_backend.layers import Block, Context, Linear
from jaxsloth.kernels.attention import jax_library_ops as attention_ops
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.lora_matmul import pallas_kernel as wide
from jaxsloth.kernels.lora_matmul.contract import room_for
from jaxsloth.kernels.lora_matmul.pallas_kernel import Group
from jaxsloth.models import spec as specs
from jaxsloth.models.buildable import fused_refusal
from jaxsloth.models.names import layer_linears, stacked_name

if TYPE_CHECKING:
    from jaxsloth.jax_backend.decoder import Decoder

FULL = ("x1", "x2", "attention", "lows")
FEW = (*FULL, "qkv")
KEPT = {"none": (*FEW, "normed1", "normed2", "rstd1", "rstd2", "merged"), "selective": FEW, "offload": FEW, "full": FULL}


def refusal(spec: specs.ModelSpec) -> str | None:
    """Why these blocks can't be trained this way, or None."""
    reason, lora = fused_refusal(spec), spec.lora
    if reason is not None or lora is None:
        return reason
    period = spec.layer_period()
    adapted = {stacked_name(module, period)[0] for module in lora.modules}
    for index, layer in enumerate(spec.layers[:period]):
        if layer.mlp.activation == "gelu":
            return "has no erf in its kernels"
        linears, first = layer_linears(spec, index), 1 if layer.attention.fused_qkv else 3
        for shared in (linears[:first], linears[first : first + 1], linears[first + 1 : -1], linears[-1:]):
            reason = wide.refuses(shared[0].in_features, sum(lora.r for one in shared if one.name in adapted))
            if reason is not None:
                return reason
    return None


def hidden(decoder: Decoder, input_ids: Any, context: Context, mode: str, documents: Any, plain: bool, unrolled: bool) -> Any:
    """Final hidden states ``[tokens, hidden]``, normed.

    unrolled: the layers one after the other, a program as long as the model is deep that stacks and slices nothing, instead of
    a scan.
    """
    x = decoder.model.embed_tokens.weight[...][input_ids.reshape(-1)].astype(decoder.dtype)
    if decoder.spec.embedding.scale != 1.0:
        x = x * jnp.asarray(decoder.spec.embedding.scale, decoder.dtype)
    if context.noise is not None:
        x = x + context.noise.reshape(x.shape).astype(decoder.dtype)
    blocks = tuple(decoder.model.layers)
    # o_proj and down_proj take the stream's gradient, which is as wide in every block.
    room = room_for(max(sum(_ranks(block.groups()[which])) for block in blocks for which in (OUT, DOWN)))
    kinds = tuple(_kind(block, plain, decoder.dtype, room) for block in blocks)
    count = len(decoder.spec.layers) // len(blocks)
    fixed = Pass(kinds, count, mode, unrolled, (input_ids.shape[0], input_ids.shape[1]))
    shared = {
        "tables": tuple(context.tables[rope] for rope in ropes_of(kinds)),
        "segments": context.segments,
        "documents": documents,
    }
    adapters = tuple(tuple(_adapters(part) for part in block.groups()) for block in blocks)
    frozen = tuple(_frozen(block, decoder.dtype) for block in blocks)
    return decoder.model.norm(_stack(fixed, adapters, x, frozen, shared))


def _ranks(linears: list[Linear]) -> tuple[int, ...]:
    return tuple(one.lora_A[...].shape[-2] if one._adapted else 0 for one in linears)


def _kind(block: Block, plain: bool, dtype: Any, stream_room: int) -> Kind:
    def group(which: int, linears: list[Linear]) -> Group:
        return Group(
            linears[0]._shape[1],
            tuple(one._shape[0] for one in linears),
            _ranks(linears),
            tuple(one._scale if one._adapted else 1.0 for one in linears),
            stream_room if which in (OUT, DOWN) else room_for(sum(_ranks(linears))),
            platform() != "cuda",
        )

    spec = block.self_attn._spec
    refused = attention_ops.refuses(platform(), dtype, spec.head_dim, spec.causal, spec.soft_cap)
    kernel = block.self_attn._implementation.load()
    settings = attention_ops.Settings(spec.scale, spec.causal, spec.window, spec.soft_cap, plain, refused is None, kernel)
    return Kind(block._spec, tuple(group(which, part) for which, part in enumerate(block.groups())), settings)


def _adapters(linears: list[Linear]) -> tuple[Any, ...]:
    return tuple((one.lora_A[...], one.lora_B[...]) if one._adapted else None for one in linears)


def _frozen(block: Block, dtype: Any) -> Tree:
    """A stack's arrays that are not trained: norms, and of each group the bases and the bias."""

    def bias(linears: list[Linear]) -> Any:
        if not any(one._biased for one in linears):
            return None
        stacks = next(one.bias[...].shape[0] for one in linears if one._biased)
        parts = [one.bias[...] if one._biased else jnp.zeros((stacks, one._shape[0])) for one in linears]
        return jnp.concatenate([part.astype(dtype) for part in parts], axis=1)

    parts = block.groups()
    return {
        "norm1": block.input_layernorm.weight[...],
        "norm2": block.post_attention_layernorm.weight[...],
        "bases": tuple(tuple(one.base() for one in part) for part in parts),
        "biases": tuple(bias(part) for part in parts),
    }


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stack(fixed: Pass, adapters: Any, x: Any, frozen: Any, shared: Any) -> Any:
    """The stream ``[tokens, hidden]`` behind all blocks. Only adapters get gradients."""
    return _forward(fixed, adapters, x, frozen, shared, None)[0]


def _forward(fixed: Pass, adapters: Any, x: Any, frozen: Any, shared: Any, mode: str | None) -> tuple[Any, Any]:
    """(the stream, what is kept of every repetition of the period); mode None keeps nothing."""
    leave = _to_host if fixed.offloads and mode else lambda kept: kept
    if fixed.unrolled:
        delta, every = None, []
        for index in range(fixed.count):
            own = _select(adapters, index)
            x, delta, kept = _period_forward(fixed, mode, x, delta, jnp.int32(index), own, frozen, shared)
            every.append(leave(kept))
        return x + delta, every

    def body(carried: Any, scanned: Any) -> tuple[Any, Any]:
        x, delta, kept = _period_forward(fixed, mode, *carried, *scanned, frozen, shared)
        return (x, delta), leave(kept)

    (x, delta), kept = jax.lax.scan(body, (x, jnp.zeros_like(x)), (jnp.arange(fixed.count, dtype=jnp.int32), adapters))
    return x + delta, kept


# A function of its own under jit, both of them: layers that follow one another are traced and lowered once instead of each
# (XLA puts them into the program before it optimizes anything).
@partial(jax.jit, static_argnums=(0, 1))
def _period_forward(
    fixed: Pass, mode: str | None, x: Any, delta: Any, index: Any, own: Any, frozen: Any, shared: Any
) -> tuple[Any, Any, Any]:
    """(x2, the last block's output, what each block keeps) of one repetition of the period."""
    kept = []
    for place, kind in enumerate(fixed.kinds):
        block = BlockPass(fixed, kind, frozen[place], own[place], index, shared)
        x, delta, saved = block.forward(x, delta)
        kept.append({name: saved[name] for name in KEPT[mode]} if mode else {})
    return x, delta, tuple(kept)


@partial(jax.jit, static_argnums=(0,))
def _period_backward(fixed: Pass, d: Any, index: Any, own: Any, saved: Any, frozen: Any, shared: Any) -> tuple[Any, Any]:
    """(the gradient of the stream before the period, those of its adapters)."""
    if fixed.mode != "none":
        # Nothing is formed again before its gradient has come: else it would be kept after all.
        saved, d = jax.lax.optimization_barrier((saved, d))
    gradients = []
    for place in reversed(range(len(fixed.kinds))):
        block = BlockPass(fixed, fixed.kinds[place], frozen[place], own[place], index, shared)
        d, found = block.backward(d, saved[place])
        gradients.insert(0, found)
    return d, tuple(gradients)


def _select(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda stack: stack[index], tree)


def _stack_forward(fixed: Pass, adapters: Any, x: Any, frozen: Any, shared: Any) -> tuple[Any, Any]:
    out, kept = _forward(fixed, adapters, x, frozen, shared, fixed.mode)
    return out, (adapters, frozen, shared, kept)


def _stack_backward(fixed: Pass, residuals: Any, d: Any) -> tuple[Any, ...]:
    adapters, frozen, shared, kept = residuals
    d = jnp.pad(d, ((0, 0), (0, fixed.kinds[-1].groups[DOWN].room)))

    if not fixed.unrolled:

        def body(d: Any, scanned: Any) -> tuple[Any, Any]:
            index, own, saved = scanned
            return _period_backward(fixed, d, index, own, _to_device(saved) if fixed.offloads else saved, frozen, shared)

        scanned = jnp.arange(fixed.count, dtype=jnp.int32), adapters, kept
        return jax.lax.scan(body, d, scanned, reverse=True)[1], None, None, None

    every: list[Any] = [None] * fixed.count
    coming = _to_device(kept[-1]) if fixed.offloads else kept[-1]
    for index in reversed(range(fixed.count)):
        saved = coming
        if index:
            coming = kept[index - 1]
            if fixed.offloads:
                coming, d = jax.lax.optimization_barrier((coming, d))
                coming = _to_device(coming)
        own = _select(adapters, index)
        d, every[index] = _period_backward(fixed, d, jnp.int32(index), own, saved, frozen, shared)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *every), None, None, None


_stack.defvjp(_stack_forward, _stack_backward)


def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), tree)


def _to_device(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)
