"""The blocks of a pre-norm decoder for training, forward and backward written out.

Same mathematics as layers.py. The linear layers that share an input are one product each way with their adapters as extra
columns (kernels/lora_matmul/pallas_kernel.py), norms take the residual sum along, gate and up are one array, and what is kept
for the backward is said here instead of being found by tracing. x1 and x2 are the residual stream before attention and MLP:

    none       x1, x2, both norms' outputs, q k v, attention's output and statistics, gate and up
    selective  x1, x2, q k v, attention's output and statistics; norms, gate and up are formed again
    offload    the same, in pinned host memory, fetched a layer ahead
    full       x1, x2, attention's output and statistics

In every mode the products with A, 64 columns each, are kept too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxsloth.jax_backend.layers import Block, Context, Linear
from jaxsloth.kernels.attention import jax_library_ops as attention_ops
from jaxsloth.kernels.gated_activation.pallas_kernel import activate_merged, activate_merged_backward
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.lora_matmul import pallas_kernel as wide
from jaxsloth.kernels.lora_matmul.pallas_kernel import ROOM, Group
from jaxsloth.kernels.rms_norm.pallas_kernel import add_norm, add_norm_backward
from jaxsloth.kernels.rope import pallas_kernel as rope_kernel
from jaxsloth.kernels.rope.xla_ops import rope
from jaxsloth.models import spec as specs
from jaxsloth.models.buildable import fused_refusal
from jaxsloth.models.names import layer_linears

if TYPE_CHECKING:
    from jaxsloth.jax_backend.decoder import Decoder

FULL = ("x1", "x2", "attention", "lows")
FEW = (*FULL, "qkv")
KEPT = {"none": (*FEW, "normed1", "normed2", "rstd1", "rstd2", "merged"), "selective": FEW, "offload": FEW, "full": FULL}
# Elements of gate and up that an MLP whose activations are formed again handles at once: 512 MiB of them in half precision.
MLP_TILE = 2**28

# A block's groups of linear layers that share their input.
QKV, OUT, GATE_UP, DOWN = range(4)

Tree = dict[str, Any]


def refusal(spec: specs.ModelSpec) -> str | None:
    """Why these blocks can't be trained this way, or None."""
    reason, lora = fused_refusal(spec), spec.lora
    if reason is not None or lora is None:
        return reason
    for index, layer in enumerate(spec.layers):
        if layer.mlp.activation == "gelu":
            return "has no erf in its kernels"
        linears = layer_linears(spec, index)
        for shared in (linears[: 1 if layer.attention.fused_qkv else 3], linears[-3 if not layer.mlp.fused else -2 : -1]):
            reason = wide.refuses(shared[0].in_features, tuple(lora.r for _ in shared))
            if reason is not None:
                return reason
        reason = wide.refuses(linears[-1].in_features, (lora.r,)) or wide.refuses(
            layer.attention.heads * layer.attention.head_dim, (lora.r,)
        )
        if reason is not None:
            return reason
    return None


@dataclass(frozen=True)
class Kind:
    """What is fixed about a block."""

    spec: specs.Layer
    groups: tuple[Group, ...]
    attention: attention_ops.Settings

    @property
    def interpret(self) -> bool:
        return self.groups[QKV].interpret


@dataclass(frozen=True)
class Pass:
    """What is fixed about a pass: the kinds of blocks in a period, how often they repeat, and how."""

    kinds: tuple[Kind, ...]
    count: int
    mode: str
    unrolled: bool
    shape: tuple[int, int]  # of the batch

    @property
    def offloads(self) -> bool:
        return self.mode == "offload" and platform() == "cuda"


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
    kinds = tuple(_kind(block, plain, decoder.dtype) for block in blocks)
    count = len(decoder.spec.layers) // len(blocks)
    fixed = Pass(kinds, count, mode, unrolled, (input_ids.shape[0], input_ids.shape[1]))
    shared = {
        "tables": tuple(context.tables[rope] for rope in _ropes(kinds)),
        "segments": context.segments,
        "documents": documents,
    }
    adapters = tuple(tuple(_adapters(part) for part in _parts(block)) for block in blocks)
    frozen = tuple(_frozen(block, decoder.dtype) for block in blocks)
    return decoder.model.norm(_stack(fixed, adapters, x, frozen, shared))


def _ropes(kinds: tuple[Kind, ...]) -> list[Any]:
    return list(dict.fromkeys(kind.spec.attention.rope for kind in kinds))


def _parts(block: Block) -> tuple[list[Linear], ...]:
    attention, mlp = block.self_attn, block.mlp
    qkv = [attention.qkv_proj] if attention._spec.fused_qkv else [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_up_proj] if mlp._spec.fused else [mlp.gate_proj, mlp.up_proj]
    return qkv, [attention.o_proj], gate_up, [mlp.down_proj]


def _kind(block: Block, plain: bool, dtype: Any) -> Kind:
    def group(linears: list[Linear]) -> Group:
        return Group(
            linears[0]._shape[1],
            tuple(one._shape[0] for one in linears),
            tuple(one.lora_A[...].shape[-2] if one._adapted else 0 for one in linears),
            tuple(one._scale if one._adapted else 1.0 for one in linears),
            platform() != "cuda",
        )

    spec = block.self_attn._spec
    refused = attention_ops.refuses(platform(), dtype, spec.head_dim, spec.causal, spec.soft_cap)
    kernel = block.self_attn._implementation.load()
    settings = attention_ops.Settings(spec.scale, spec.causal, spec.window, spec.soft_cap, plain, refused is None, kernel)
    return Kind(block._spec, tuple(group(part) for part in _parts(block)), settings)


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

    parts = _parts(block)
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

    def period(x: Any, delta: Any, index: Any, own: Any) -> tuple[Any, Any, Any]:
        kept = []
        for place, kind in enumerate(fixed.kinds):
            block = BlockPass(fixed, kind, frozen[place], own[place], index, shared)
            x, delta, saved = block.forward(x, delta)
            saved = {name: saved[name] for name in KEPT[mode]} if mode else {}
            kept.append(_to_host(saved) if fixed.offloads else saved)
        return x, delta, tuple(kept)

    if fixed.unrolled:
        delta, every = None, []
        for index in range(fixed.count):
            x, delta, kept = period(x, delta, jnp.int32(index), _select(adapters, index))
            every.append(kept)
        return x + delta, every

    def body(carried: Any, scanned: Any) -> tuple[Any, Any]:
        x, delta, kept = period(*carried, *scanned)
        return (x, delta), kept

    (x, delta), kept = jax.lax.scan(body, (x, jnp.zeros_like(x)), (jnp.arange(fixed.count, dtype=jnp.int32), adapters))
    return x + delta, kept


def _select(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda stack: stack[index], tree)


def _stack_forward(fixed: Pass, adapters: Any, x: Any, frozen: Any, shared: Any) -> tuple[Any, Any]:
    out, kept = _forward(fixed, adapters, x, frozen, shared, fixed.mode)
    return out, (adapters, frozen, shared, kept)


def _stack_backward(fixed: Pass, residuals: Any, d: Any) -> tuple[Any, ...]:
    adapters, frozen, shared, kept = residuals
    d = jnp.pad(d, ((0, 0), (0, ROOM)))

    def period(d: Any, index: Any, own: Any, saved: Any) -> tuple[Any, Any]:
        if fixed.mode != "none":
            # Nothing is formed again before its gradient has come: else it would be kept after all.
            saved, d = jax.lax.optimization_barrier((saved, d))
        gradients = []
        for place in reversed(range(len(fixed.kinds))):
            block = BlockPass(fixed, fixed.kinds[place], frozen[place], own[place], index, shared)
            d, found = block.backward(d, saved[place])
            gradients.insert(0, found)
        return d, tuple(gradients)

    if not fixed.unrolled:

        def body(d: Any, scanned: Any) -> tuple[Any, Any]:
            index, own, saved = scanned
            return period(d, index, own, _to_device(saved) if fixed.offloads else saved)

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
        d, every[index] = period(d, jnp.int32(index), _select(adapters, index), saved)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *every), None, None, None


_stack.defvjp(_stack_forward, _stack_backward)


def _to_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), tree)


def _to_device(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)


class BlockPass:
    """One block, both ways.

    frozen: the stack's arrays, read at `index`. adapters: this block's own. Arrays called wide have ROOM free columns behind
    their rows.
    """

    def __init__(self, fixed: Pass, kind: Kind, frozen: Tree, adapters: Any, index: Any, shared: Tree) -> None:
        self._kind, self._shape, self._index = kind, fixed.shape, index
        self._norm1, self._norm2 = frozen["norm1"][index], frozen["norm2"][index]
        dtype = self._norm1.dtype
        around = [wide.margins(group, own, dtype) for group, own in zip(kind.groups, adapters, strict=True)]
        biases = [None if bias is None else bias[index] for bias in frozen["biases"]]
        self._linears = list(zip(kind.groups, frozen["bases"], around, biases, strict=True))
        self._tables = shared["tables"][_ropes(fixed.kinds).index(kind.spec.attention.rope)]
        self._segments, self._documents = shared["segments"], shared["documents"]
        self._whole = fixed.mode == "none"

    def forward(self, x: Any, delta: Any) -> tuple[Any, Any, Tree]:
        """(x2, the MLP's output, all that may be kept); the stream is x + delta, ``[tokens, hidden]``."""
        kind = self._kind
        x1, normed1, rstd1 = self._norm(x, delta, 1)
        qkv, low_qkv, normed1 = self._linear(QKV, normed1)
        q, k, v = self._split(qkv)
        attention = attention_ops.forward(q, k, v, kind.attention, self._segments, self._documents)
        rows = jnp.pad(self._attended(attention), ((0, 0), (0, ROOM)))
        out, low_o, _ = self._linear(OUT, rows)
        x2, normed2, rstd2 = self._norm(x1, out, 2)
        parts = []
        for tile in self._tiles(normed2.shape[0]):
            merged, low_gate_up, part = self._linear(GATE_UP, _rows(normed2, tile, parts))
            h = activate_merged(merged, kind.spec.mlp.width, kind.spec.mlp.activation, ROOM, interpret=kind.interpret)
            out, low_down, _ = self._linear(DOWN, h)
            parts.append((out, low_gate_up, low_down, merged, part))
        out, low_gate_up, low_down, merged, normed2 = _join(parts)
        saved = {
            "x1": x1,
            "x2": x2,
            "normed1": normed1,
            "normed2": normed2,
            "rstd1": rstd1,
            "rstd2": rstd2,
            "qkv": (q, k, v),
            "attention": attention,
            "lows": (low_qkv, low_o, low_gate_up, low_down),
            "merged": merged,
        }
        return x2, out, saved

    def backward(self, d: Any, saved: Tree) -> tuple[Any, Any]:
        """(the gradient of the stream before the block, those of the adapters as they came); d is wide, that behind it."""
        kind = self._kind
        low_qkv, low_o, low_gate_up, low_down = saved["lows"]
        normed2, rstd2 = (saved["normed2"], saved["rstd2"]) if self._whole else self._norm(saved["x2"], None, 2)[1:]
        parts = []
        for tile in self._tiles(d.shape[0]):
            normed, low = _rows(normed2, tile, parts), _rows(low_gate_up, tile)
            merged = saved["merged"] if self._whole else self._linear(GATE_UP, normed, low)[0]
            dh, d_tile = self._linear_backward(DOWN, _rows(d, tile))
            dmerged, h = activate_merged_backward(merged, dh, kind.spec.mlp.activation, ROOM, interpret=kind.interpret)
            of_down = self._gradients(DOWN, h, _rows(low_down, tile), d_tile)
            dnormed, dmerged = self._linear_backward(GATE_UP, dmerged)
            of_gate_up = self._gradients(GATE_UP, normed, low, dmerged)
            parts.append((dnormed, d_tile, of_gate_up, of_down))
        if len(parts) == 1:
            dnormed, d, of_gate_up, of_down = parts[0]
        else:
            dnormed = jnp.concatenate([part[0] for part in parts])
            of_gate_up, of_down = jax.tree.map(lambda *each: sum(each), *(part[2:] for part in parts))
        # Here and below: left for later, as nothing else waits for them, gradients would keep what they are made of alive.
        dnormed, d, of_gate_up, of_down = jax.lax.optimization_barrier((dnormed, d, of_gate_up, of_down))
        d = self._norm_backward(saved["x2"], rstd2, dnormed, d, 2)

        dattended, d = self._linear_backward(OUT, d)
        of_o = self._gradients(OUT, self._attended(saved["attention"]), low_o, d)
        normed1, rstd1 = (saved["normed1"], saved["rstd1"]) if self._whole else self._norm(saved["x1"], None, 1)[1:]
        q, k, v = saved["qkv"] if "qkv" in saved else self._split(self._linear(QKV, normed1, low_qkv)[0])
        slopes = attention_ops.backward(
            q, k, v, saved["attention"], dattended.reshape(q.shape), kind.attention, self._segments, self._documents
        )
        dnormed, dqkv = self._linear_backward(QKV, self._merge(*slopes))
        of_qkv = self._gradients(QKV, normed1, low_qkv, dqkv)
        d = self._norm_backward(saved["x1"], rstd1, dnormed, d, 1)
        return jax.lax.optimization_barrier((d, (of_qkv, of_o, of_gate_up, of_down)))

    def _linear(self, which: int, x: Any, low: Any = None) -> tuple[Any, Any, Any]:
        group, bases, around, bias = self._linears[which]
        return wide.forward(group, x, bases, around, bias, self._index, low)

    def _linear_backward(self, which: int, dy: Any) -> tuple[Any, Any]:
        group, bases, around, _ = self._linears[which]
        return wide.backward(group, dy, bases, around, self._index)

    def _gradients(self, which: int, x: Any, low: Any, dy: Any) -> tuple[Any, ...]:
        return wide.gradients(self._linears[which][0], x, low, dy)

    def _norm(self, x: Any, delta: Any, which: int) -> tuple[Any, Any, Any]:
        norm, weight = (self._kind.spec.attention_norm, self._norm1) if which == 1 else (self._kind.spec.mlp_norm, self._norm2)
        assert norm is not None
        return add_norm(x, delta, weight, eps=norm.eps, offset=norm.weight_offset, room=ROOM, interpret=self._kind.interpret)

    def _norm_backward(self, x: Any, rstd: Any, dnormed: Any, d: Any, which: int) -> Any:
        norm, weight = (self._kind.spec.attention_norm, self._norm1) if which == 1 else (self._kind.spec.mlp_norm, self._norm2)
        assert norm is not None
        return add_norm_backward(x, weight, rstd, dnormed, d, offset=norm.weight_offset, interpret=self._kind.interpret)

    def _split(self, qkv: Any) -> tuple[Any, Any, Any]:
        """q and k turned, and v, ``[batch, length, heads, head_dim]``, of the merged projection."""
        own, (cos, sin) = self._kind.spec.attention, self._tables
        heads = rope_kernel.Heads(own.heads, own.kv_heads, own.head_dim, self._kind.interpret)
        shape = (*self._shape, -1, own.head_dim)
        if rope_kernel.refuses(own.head_dim, cos.shape[-1]) is None:
            q, k, v = rope_kernel.split(heads, qkv, *self._flat_tables())
            return q.reshape(shape), k.reshape(shape), v.reshape(shape)
        q, k, v = (qkv[:, start:end].reshape(shape) for start, end in pairwise((0, *accumulate(heads.widths))))
        return rope(q, cos, sin), rope(k, cos, sin), v

    def _merge(self, dq: Any, dk: Any, dv: Any) -> Any:
        """The gradient of the merged projection, wide."""
        own, (cos, sin) = self._kind.spec.attention, self._tables
        tokens = dq.shape[0] * dq.shape[1]
        if rope_kernel.refuses(own.head_dim, cos.shape[-1]) is None:
            heads = rope_kernel.Heads(own.heads, own.kv_heads, own.head_dim, self._kind.interpret)
            return rope_kernel.merge(heads, ROOM, *(d.reshape(tokens, -1) for d in (dq, dk, dv)), *self._flat_tables())
        parts = [rope(dq, cos, -sin), rope(dk, cos, -sin), dv]
        return jnp.concatenate([*(part.reshape(tokens, -1) for part in parts), jnp.zeros((tokens, ROOM), dq.dtype)], axis=1)

    def _flat_tables(self) -> list[Any]:
        return [table.reshape(self._shape[0] * self._shape[1], -1) for table in self._tables]

    def _attended(self, kept: Any) -> Any:
        own = self._kind.spec.attention
        shape = (*self._shape, own.heads, own.head_dim)
        out = attention_ops.attended(kept, shape, self._kind.attention, self._documents)
        return out.reshape(self._shape[0] * self._shape[1], -1)

    def _tiles(self, tokens: int) -> list[slice]:
        count = 1 if self._whole else -(-tokens * self._kind.groups[GATE_UP].out_features // MLP_TILE)
        size = -(-tokens // count)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _rows(x: Any, tile: slice, before: Any = None) -> Any:
    """The rows of a tile; not before those of the tile that came `before` are done, so that one is worked on at a time."""
    if tile.start == 0 and tile.stop == x.shape[0]:
        return x
    return jax.lax.optimization_barrier((x[tile], before[-1]))[0] if before else x[tile]


def _join(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return parts[0] if len(parts) == 1 else tuple(jnp.concatenate(each) for each in zip(*parts, strict=True))
