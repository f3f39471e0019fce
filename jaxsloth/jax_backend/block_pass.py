"""One block of a pre-norm decoder for training, forward and backward written out: what fused.py makes a whole pass of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp

from jaxsloth.kernels.attention import jax_library_ops as attention_ops
from jaxsloth.kernels.gated_activation.pallas_kernel import activate_merged, activate_merged_backward
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.lora_matmul import pallas_kernel as wide
from jaxsloth.kernels.lora_matmul.pallas_kernel import Group
from jaxsloth.kernels.rms_norm.pallas_kernel import add_norm, add_norm_backward
from jaxsloth.kernels.rope import pallas_kernel as rope_kernel
from jaxsloth.kernels.rope.xla_ops import rope
from jaxsloth.models import spec as specs

# Elements of gate and up that an MLP whose activations are formed again handles at once: 512 MiB of them in half precision.
MLP_TILE = 2**28

# A block's groups of linear layers that share their input.
QKV, OUT, GATE_UP, DOWN = range(4)

Tree = dict[str, Any]


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


def ropes_of(kinds: tuple[Kind, ...]) -> list[Any]:
    return list(dict.fromkeys(kind.spec.attention.rope for kind in kinds))


class BlockPass:
    """One block, both ways.

    frozen: the stack's arrays, read at `index`. adapters: this block's own. Arrays called wide have free columns behind
    their rows: as many as the group of linears that takes them has room.
    """

    def __init__(self, fixed: Pass, kind: Kind, frozen: Tree, adapters: Any, index: Any, shared: Tree) -> None:
        self._kind, self._shape, self._index = kind, fixed.shape, index
        self._norm1, self._norm2 = frozen["norm1"][index], frozen["norm2"][index]
        dtype = self._norm1.dtype
        around = [wide.margins(group, own, dtype) for group, own in zip(kind.groups, adapters, strict=True)]
        biases = [None if bias is None else bias[index] for bias in frozen["biases"]]
        self._linears = list(zip(kind.groups, frozen["bases"], around, biases, strict=True))
        self._tables = shared["tables"][ropes_of(fixed.kinds).index(kind.spec.attention.rope)]
        self._segments, self._documents = shared["segments"], shared["documents"]
        self._whole = fixed.mode == "none"

    def forward(self, x: Any, delta: Any) -> tuple[Any, Any, Tree]:
        """(x2, the MLP's output, all that may be kept); the stream is x + delta, ``[tokens, hidden]``."""
        kind = self._kind
        x1, normed1, rstd1 = self._norm(x, delta, 1)
        qkv, low_qkv, normed1 = self._linear(QKV, normed1)
        q, k, v = self._split(qkv)
        attention = attention_ops.forward(q, k, v, kind.attention, self._segments, self._documents)
        rows = jnp.pad(self._attended(attention), ((0, 0), (0, kind.groups[OUT].room)))
        out, low_o, _ = self._linear(OUT, rows)
        x2, normed2, rstd2 = self._norm(x1, out, 2)
        parts = []
        for tile in self._tiles(normed2.shape[0]):
            merged, low_gate_up, part = self._linear(GATE_UP, _rows(normed2, tile, parts))
            room = kind.groups[DOWN].room
            h = activate_merged(merged, kind.spec.mlp.width, kind.spec.mlp.activation, room, interpret=kind.interpret)
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
            room = kind.groups[GATE_UP].room
            dmerged, h = activate_merged_backward(merged, dh, kind.spec.mlp.activation, room, interpret=kind.interpret)
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
        room = self._kind.groups[QKV if which == 1 else GATE_UP].room
        return add_norm(x, delta, weight, eps=norm.eps, offset=norm.weight_offset, room=room, interpret=self._kind.interpret)

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
        tokens, room = dq.shape[0] * dq.shape[1], self._kind.groups[QKV].room
        if rope_kernel.refuses(own.head_dim, cos.shape[-1]) is None:
            heads = rope_kernel.Heads(own.heads, own.kv_heads, own.head_dim, self._kind.interpret)
            return rope_kernel.merge(heads, room, *(d.reshape(tokens, -1) for d in (dq, dk, dv)), *self._flat_tables())
        parts = [rope(dq, cos, -sin), rope(dk, cos, -sin), dv]
        return jnp.concatenate([*(part.reshape(tokens, -1) for part in parts), jnp.zeros((tokens, room), dq.dtype)], axis=1)

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
    """The rows of a tile; not before those of the tile that came `before` are done, so that one is worked on at a time. x may
    be None, what a group without room has instead of its product with A."""
    if x is None:
        return None
    if tile.start == 0 and tile.stop == x.shape[0]:
        return x
    return jax.lax.optimization_barrier((x[tile], before[-1]))[0] if before else x[tile]


def _join(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
