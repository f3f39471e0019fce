"""One block of a pre-norm decoder for training, forward and backward written out: what fused.py makes a whole pass of.

Kept a layer, by `gradient_checkpointing` (x1 and x2 are the residual stream before attention and MLP):
    none       everything but the activation's product: x1, x2, both norms' outputs, q k v, the attention's output, gate and up
    selective  x1, x2, q k v, the attention's output; norms, gate and up are formed again
    offload    the same four, in pinned host memory, fetched a layer ahead; x1 alone where that memory is short
    full       x1
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from jaxsloth.kernels.attention import library_ops as attention_ops
from jaxsloth.kernels.attention.library_ops import Layout, Settings
from jaxsloth.models import spec as specs
from jaxsloth.torch_backend import groups
from jaxsloth.torch_backend.groups import Group, Weights
from jaxsloth.torch_backend.layers import Block, Linear, Ops

# Elements of gate and up that an MLP whose activations are recomputed handles at once: 512 MiB of them in half precision.
MLP_TILE = 2**28


@dataclass(frozen=True)
class Kernels:
    """The modules of the implementations that the registry chose, whose functions work on a pass' own buffers."""

    norm: ModuleType
    rope: ModuleType
    activation: ModuleType
    weights: ModuleType  # `Placement` and `dequantize_into`
    loss: ModuleType  # `softmax`

    @staticmethod
    def of(ops: Ops) -> Kernels:
        if ops.chosen["nf4_dequantize"].name == "triton":
            from jaxsloth.kernels.lora_matmul import triton_kernel as weights
        else:
            from jaxsloth.kernels.lora_matmul import extended as weights
        names = ("rms_norm", "rope", "gated_activation")
        norm, rope, activation = (ops.chosen[name].module() for name in names)
        return Kernels(norm, rope, activation, weights, ops.chosen["linear_cross_entropy"].module())


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device. chosen: indices into the flat batch of the tokens that have a target, filled up with
    `tokens`; targets: theirs, filled up with the ignore index. tables: (cos, sin) ``[tokens, half]`` a rotary setting. noise:
    what is added to the embeddings, ``[batch, length, hidden]``."""

    input_ids: torch.Tensor
    layout: Layout
    tables: dict[specs.Rope, tuple[torch.Tensor, torch.Tensor]]
    chosen: torch.Tensor
    targets: torch.Tensor
    noise: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, length)."""
        return self.layout.batch, self.layout.length


@dataclass
class Saved:
    """What one layer's forward leaves to its backward; None where it is recomputed."""

    x1: torch.Tensor
    qkv: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    x2: torch.Tensor | None = None
    stats: tuple[torch.Tensor, ...] = ()
    rstd1: torch.Tensor | None = None
    rstd2: torch.Tensor | None = None
    normed1: torch.Tensor | None = None
    normed2: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    low_o: torch.Tensor | None = None  # x·Aᵀ of the output projection and of down_proj
    low_down: torch.Tensor | None = None


class LayerPass:
    """One block, both ways. `block` holds the weights; rows of wide buffers have `room` free columns behind them."""

    def __init__(self, block: Block, layer: specs.Layer, kernels: Kernels) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.spec, self.kernels = layer, kernels
        self.norm1, self.norm2 = block.input_layernorm.weight, block.post_attention_layernorm.weight
        self.qkv = Group(_present(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"))
        self.o = Group([attention.o_proj])
        self.gate_up = Group(_present(mlp, "gate_up_proj", "gate_proj", "up_proj"))
        self.down = Group([mlp.down_proj])
        own = layer.attention
        self.settings = Settings(
            own.heads,
            own.kv_heads,
            own.head_dim,
            own.scale,
            own.causal,
            own.window,
            own.soft_cap,
            attention.attend,
            import_module(attention.attend.__module__) if attention.implementation.name == "triton" else None,
        )
        self.q_width, self.kv_width = own.heads * own.head_dim, own.kv_heads * own.head_dim
        self.stream_room = max(self.o.room, self.down.room)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, kv = self.q_width, self.kv_width
        return qkv[:, :q], qkv[:, q : q + kv], qkv[:, q + kv : q + 2 * kv]

    def _norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, which: int, total: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the normed sum with room behind its rows, the reciprocals)."""
        norm, weight, group = (
            (self.spec.attention_norm, self.norm1, self.qkv) if which == 1 else (self.spec.mlp_norm, self.norm2, self.gate_up)
        )
        assert norm is not None
        normed = wide_rows(x.shape[0], x.shape[1], group.room, x)
        rstd = self.kernels.norm.add_norm(
            x, delta, weight, normed[:, : x.shape[1]], eps=norm.eps, offset=norm.weight_offset, total=total
        )
        return normed, rstd

    def _qkv(self, normed: torch.Tensor, batch: Batch, weights: Weights) -> torch.Tensor:
        """Queries and keys, turned, and values, ``[tokens, q + 2·kv]``."""
        qkv = normed.new_empty(normed.shape[0], self.qkv.out_features)
        groups.forward(self.qkv, weights.of(self.qkv), normed, qkv)
        rope = self.spec.attention.rope
        assert rope is not None
        q, k, _ = self._split(qkv)
        self.kernels.rope.rotate(q, k, *batch.tables[rope], q, k, head_dim=self.spec.attention.head_dim)
        return qkv

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor | None, batch: Batch, weights: Weights, mode: str | None
    ) -> tuple[torch.Tensor, torch.Tensor, Saved | None]:
        """(x2, the MLP's output, what is kept); the stream is x + delta. mode None keeps nothing."""
        x1 = x if delta is None else torch.empty_like(delta)
        normed1, rstd1 = self._norm(x, delta, 1, x1)
        qkv = self._qkv(normed1, batch, weights)
        attended, stats = attention_ops.forward(*self._split(qkv), self.settings, batch.layout)
        out = torch.empty_like(x1)
        low_o = groups.forward(self.o, weights.of(self.o), attended, out)
        x2 = torch.empty_like(x1)
        normed2, rstd2 = self._norm(x1, out, 2, x2)
        everything = mode == "none"
        saved = None
        if mode is not None:
            saved = Saved(x1)
            if mode != "full":
                saved.qkv, saved.attended, saved.stats, saved.x2, saved.low_o = qkv, attended, stats, x2, low_o
            if everything:
                saved.rstd1, saved.rstd2, saved.normed1, saved.normed2 = rstd1, rstd2, normed1, normed2
        del qkv, attended, normed1
        # The attention's output has been added in: its memory takes the MLP's.
        for rows in self._tiles(x2.shape[0], everything):
            gate_up, low = self._mlp(normed2[rows], out[rows], weights)
            if saved is not None and everything:
                saved.gate_up, saved.low_down = gate_up, None if low is None else low.clone()
            del gate_up
        return x2, out, saved

    def _tiles(self, tokens: int, whole: bool) -> list[slice]:
        count = 1 if whole else -(-tokens * self.gate_up.out_features // MLP_TILE)
        size = -(-tokens // count)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def _gate_up(self, normed: torch.Tensor, weights: Weights) -> torch.Tensor:
        gate_up = wide_rows(normed.shape[0], self.gate_up.out_features, self.gate_up.room, normed)
        groups.forward(self.gate_up, weights.of(self.gate_up), normed, gate_up[:, : self.gate_up.out_features])
        return gate_up

    def _mlp(self, normed: torch.Tensor, out: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Writes the MLP's output; (gate and up with room behind, h·A of the last product)."""
        gate_up, width = self._gate_up(normed, weights), self.spec.mlp.width
        h = wide_rows(normed.shape[0], width, self.down.room, normed)
        self.kernels.activation.activate(
            gate_up[:, :width], gate_up[:, width : 2 * width], h[:, :width], kind=self.spec.mlp.activation
        )
        return gate_up, groups.forward(self.down, weights.of(self.down), h, out)

    def backward(self, d: torch.Tensor, saved: Saved, batch: Batch, weights: Weights, first: bool) -> None:
        """Turns the gradient of the stream behind the block into that before it, in place, and adds the adapters' gradients.

        d ``[tokens, hidden + stream_room]``. first: nothing before this block is trained, so d need not be formed.
        """
        hidden = saved.x1.shape[1]
        stream = d[:, :hidden]
        if saved.qkv is None:
            self._recompute(saved, batch, weights)
        assert saved.x2 is not None and saved.attended is not None and saved.qkv is not None
        if saved.normed2 is None:
            saved.normed2, saved.rstd2 = self._norm(saved.x2, None, 2)
        dnormed = torch.empty_like(saved.x2)
        for rows in self._tiles(d.shape[0], saved.gate_up is not None):
            self._mlp_backward(d[rows], saved, rows, weights, dnormed[rows])
        saved.gate_up = saved.normed2 = None
        assert saved.rstd2 is not None
        self.kernels.norm.add_norm_backward(
            dnormed, saved.x2, self.norm2, saved.rstd2, stream, stream, offset=self.spec.mlp_norm.weight_offset
        )
        saved.x2 = None
        dqkv = self._attention_backward(d, saved, batch, weights)
        low = None if saved.normed1 is None else self._behind(saved.normed1)
        if saved.normed1 is None:
            saved.normed1, saved.rstd1 = self._norm(saved.x1, None, 1)
        groups.backward(self.qkv, weights.of(self.qkv), dqkv, saved.normed1, low, None if first else dnormed)
        if not first:
            assert self.spec.attention_norm is not None and saved.rstd1 is not None
            offset = self.spec.attention_norm.weight_offset
            self.kernels.norm.add_norm_backward(dnormed, saved.x1, self.norm1, saved.rstd1, stream, stream, offset=offset)

    def _behind(self, normed: torch.Tensor) -> torch.Tensor:
        """``x·Aᵀ``, as a projection has left it behind the rows of its input."""
        return normed[:, self.norm1.shape[0] :]

    def _recompute(self, saved: Saved, batch: Batch, weights: Weights) -> None:
        """All that lies between x1 and the MLP."""
        saved.normed1, saved.rstd1 = self._norm(saved.x1, None, 1)
        saved.qkv = self._qkv(saved.normed1, batch, weights)
        saved.attended, saved.stats = attention_ops.forward(*self._split(saved.qkv), self.settings, batch.layout)
        out, saved.x2 = torch.empty_like(saved.x1), torch.empty_like(saved.x1)
        saved.low_o = groups.forward(self.o, weights.of(self.o), saved.attended, out)
        saved.normed2, saved.rstd2 = self._norm(saved.x1, out, 2, saved.x2)

    def _mlp_backward(self, d: torch.Tensor, saved: Saved, rows: slice, weights: Weights, dnormed: torch.Tensor) -> None:
        assert saved.normed2 is not None
        normed, width = saved.normed2[rows], self.spec.mlp.width
        gate_up = self._gate_up(normed, weights) if saved.gate_up is None else saved.gate_up
        gate, up = gate_up[:, :width], gate_up[:, width : 2 * width]
        matrix = weights.of(self.down)
        dh = d.new_empty(d.shape[0], width)
        groups.backward_input(self.down, matrix, d, dh)
        # gate and up give way to their gradients, and dh to h, which dA of down_proj needs.
        self.kernels.activation.activate_backward(gate, up, dh, gate, up, dh, kind=self.spec.mlp.activation)
        groups.backward_adapters(self.down, matrix, d, dh, saved.low_down)
        del dh
        groups.backward(self.gate_up, weights.of(self.gate_up), gate_up, normed, self._behind(normed), dnormed)

    def _attention_backward(self, d: torch.Tensor, saved: Saved, batch: Batch, weights: Weights) -> torch.Tensor:
        """dq, dk and dv before the rotation, with room behind."""
        assert saved.attended is not None and saved.qkv is not None
        rope = self.spec.attention.rope
        assert rope is not None
        dattended = torch.empty_like(saved.attended)
        groups.backward(self.o, weights.of(self.o), d, saved.attended, saved.low_o, dattended)
        dq, dk, dv = attention_ops.backward(
            dattended, *self._split(saved.qkv), saved.attended, saved.stats, self.settings, batch.layout
        )
        saved.qkv = saved.attended = None
        dqkv = wide_rows(d.shape[0], self.qkv.out_features, self.qkv.room, d)
        q_out, k_out, v_out = self._split(dqkv)
        cos, sin = batch.tables[rope]
        self.kernels.rope.rotate(dq, dk, cos, sin, q_out, k_out, head_dim=self.spec.attention.head_dim, backward=True)
        v_out.copy_(dv)
        return dqkv


def _present(module: torch.nn.Module, *names: str) -> list[Linear]:
    return [getattr(module, name) for name in names if hasattr(module, name)]


def wide_rows(rows: int, width: int, room: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised ``[rows, width + room]``."""
    return torch.empty(rows, width + room, dtype=like.dtype, device=like.device)
