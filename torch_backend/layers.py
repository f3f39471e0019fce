"""The blocks of a decoder as torch modules under Hugging Face names; each calls the ops that the registry chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from jaxsloth.kernels.attention.contract import ATTENTION
from jaxsloth.kernels.attention.contract import sizes_of as attention_sizes
from jaxsloth.kernels.dropout.contract import module_word
from jaxsloth.kernels.gated_activation.contract import GATED_ACTIVATION
from jaxsloth.kernels.linear_cross_entropy.contract import LINEAR_CROSS_ENTROPY
from jaxsloth.kernels.lora_matmul.contract import LORA_MATMUL, Dropout
from jaxsloth.kernels.nf4.contract import DEQUANTIZE, NF4, Nested
from jaxsloth.kernels.registry import Facts, Implementation, Op, select
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from jaxsloth.kernels.rope.contract import ROPE
from jaxsloth.models import spec as specs
from jaxsloth.models.names import layer_linears

OPS = (ATTENTION, GATED_ACTIVATION, LINEAR_CROSS_ENTROPY, LORA_MATMUL, RMS_NORM, ROPE)
Take = Callable[[str], "torch.Tensor | NF4"]
Adapter = tuple[nn.Parameter | None, nn.Parameter | None, float, float]  # A, B, the scaling, the dropout rate


class Ops:
    """The implementation of every op for one device and dtype, chosen once."""

    def __init__(self, facts: Facts, requested: Mapping[str, str]) -> None:
        def choose(op: Op) -> Callable[..., Any]:
            self.chosen[op.name] = select(op, "torch", facts, requested.get(op.name)).implementation
            return self.chosen[op.name].load()

        self.chosen: dict[str, Implementation] = {}  # by the op's name
        self.gated_activation = choose(GATED_ACTIVATION)
        self.linear_cross_entropy = choose(LINEAR_CROSS_ENTROPY)
        self.lora_matmul = choose(LORA_MATMUL)
        self.nf4_dequantize = choose(DEQUANTIZE)
        self.rms_norm = choose(RMS_NORM)
        self.rope = choose(ROPE)
        self._facts, self._attention = facts, requested.get(ATTENTION.name)

    def attention(self, spec: specs.Attention) -> Implementation:
        """Which one depends on the layer."""
        facts = replace(self._facts, sizes=attention_sizes(spec.head_dim, spec.soft_cap))
        return select(ATTENTION, "torch", facts, self._attention).implementation


@dataclass
class Cache:
    """The keys and values of one layer, ``[batch, capacity, kv_heads, head_dim]``; slots below `used` are written."""

    keys: torch.Tensor
    values: torch.Tensor
    used: int = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the next slots and returns everything up to them."""
        end = self.used + keys.shape[1]
        self.keys[:, self.used : end] = keys
        self.values[:, self.used : end] = values
        self.used = end
        return self.keys[:, :end], self.values[:, :end]


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    tables: (cos, sin) a rotary setting. segments: int32 ``[batch, length]``, kv_segments likewise for the keys where
    they differ (the cache's slots).
    dropout_words: int64 ``[2]``, the step's key, or None outside training; rows: int32 ``[batch]``. noise: what is added to the
    embeddings, float32 ``[batch, length, hidden]``.
    """

    tables: Mapping[specs.Rope, tuple[torch.Tensor, torch.Tensor]]
    segments: torch.Tensor
    kv_segments: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    dropout_words: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    caches: tuple[Cache, ...] | None = None


class RMSNorm(nn.Module):
    def __init__(self, norm: specs.Norm, name: str, take: Take, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(_dense(take(f"{name}.weight")), requires_grad=False)
        self._eps, self._offset, self._ops = norm.eps, norm.weight_offset, ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self.weight, eps=self._eps, offset=self._offset)


class Linear(nn.Module):
    """A frozen linear layer, dense or NF4, with room for an adapter.

    `weight` is the dense weight ``[out, in]`` or, where the base is quantized, its NF4 codes.
    """

    def __init__(self, linear: specs.Linear, take: Take, ops: Ops) -> None:
        super().__init__()
        self.name = linear.name
        self._ops = ops
        weight = take(f"{linear.name}.weight")
        self._shape: tuple[int, int] | None = None
        if isinstance(weight, NF4):
            self._shape = weight.shape
            self.register_buffer("weight", weight.codes)
            self.register_buffer("weight_absmax", weight.absmax)
            if weight.nested is not None:
                self.register_buffer("weight_nested_absmax", weight.nested.absmax)
                self.register_buffer("weight_nested_offset", weight.nested.offset)
                self.register_buffer("weight_nested_code", weight.nested.code)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(_dense(take(f"{linear.name}.bias")), requires_grad=False) if linear.bias else None
        self.lora_A: nn.Parameter | None
        self.lora_B: nn.Parameter | None
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self._scale, self._rate = 1.0, 0.0
        self._word = module_word(linear.name)

    def add_adapter(self, lora: specs.Lora, a: nn.Parameter, b: nn.Parameter) -> None:
        self.lora_A, self.lora_B = a, b
        self._scale, self._rate = lora.scale, lora.dropout

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.weight.shape[0], self.weight.shape[1]) if self._shape is None else self._shape

    @property
    def scale(self) -> float:
        """alpha / r of the adapter."""
        return self._scale

    def swap_adapter(self, adapter: Adapter) -> Adapter:
        """Takes another adapter, and hands back the one that it had."""
        # Every pass of a torch module does this to every layer: modules' attributes are set ten times slower.
        own, settings = self._parameters, self.__dict__
        before = (own["lora_A"], own["lora_B"], self._scale, self._rate)
        own["lora_A"], own["lora_B"], settings["_scale"], settings["_rate"] = adapter
        return before

    def base(self) -> torch.Tensor | NF4:
        """The frozen weight as the op takes it."""
        if self._shape is None:
            return self.weight
        nested = None
        if hasattr(self, "weight_nested_absmax"):
            nested = Nested(self.weight_nested_absmax, self.weight_nested_offset, self.weight_nested_code)
        return NF4(self.weight, self.weight_absmax, nested, self._shape)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        dropout = None
        if self._rate and self.lora_A is not None and context.dropout_words is not None:
            first, second = context.dropout_words.unbind()
            dropout = Dropout(self._rate, torch.stack([first ^ self._word, second]), context.rows)
        return self._ops.lora_matmul(
            x, self.base(), self.lora_A, self.lora_B, scale=self._scale, bias=self.bias, dropout=dropout
        )


class Attention(nn.Module):
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    qkv_proj: Linear
    o_proj: Linear

    def __init__(self, spec: specs.ModelSpec, index: int, take: Take, ops: Ops) -> None:
        super().__init__()
        attention, prefix = spec.layers[index].attention, f"model.layers.{index}.self_attn"
        self._spec, self._ops, self._index = attention, ops, index
        self.implementation = ops.attention(attention)
        self.attend = self.implementation.load()
        _add_linears(self, spec, index, "self_attn", take, ops)
        if attention.qk_norm is not None:
            self.q_norm = RMSNorm(attention.qk_norm, f"{prefix}.q_norm", take, ops)
            self.k_norm = RMSNorm(attention.qk_norm, f"{prefix}.k_norm", take, ops)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        spec, (batch, length) = self._spec, x.shape[:2]
        q, k, v = (t.view(batch, length, -1, spec.head_dim) for t in self._project(x, context))
        if spec.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rope is not None:
            cos, sin = context.tables[spec.rope]
            q, k = self._ops.rope(q, cos, sin), self._ops.rope(k, cos, sin)
        offset, kv_segments = 0, context.segments if context.kv_segments is None else context.kv_segments
        if context.caches is not None and context.kv_segments is not None:
            cache = context.caches[self._index]
            offset = cache.used
            k, v = cache.append(k, v)
            kv_segments = context.kv_segments[:, : cache.used]
        out = self.attend(
            q,
            k,
            v,
            scale=spec.scale,
            causal=spec.causal,
            window=spec.window,
            soft_cap=spec.soft_cap,
            q_segments=context.segments,
            kv_segments=kv_segments,
            q_offset=offset,
        )
        return self.o_proj(out.reshape(batch, length, -1), context)

    def _project(self, x: torch.Tensor, context: Context) -> tuple[torch.Tensor, ...]:
        spec = self._spec
        if spec.fused_qkv:
            kv_width = spec.kv_heads * spec.head_dim
            return self.qkv_proj(x, context).split([spec.heads * spec.head_dim, kv_width, kv_width], dim=-1)
        return self.q_proj(x, context), self.k_proj(x, context), self.v_proj(x, context)


class MLP(nn.Module):
    gate_proj: Linear
    up_proj: Linear
    gate_up_proj: Linear
    down_proj: Linear

    def __init__(self, spec: specs.ModelSpec, index: int, take: Take, ops: Ops) -> None:
        super().__init__()
        self._spec, self._ops = spec.layers[index].mlp, ops
        _add_linears(self, spec, index, "mlp", take, ops)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        if self._spec.fused:
            gate, up = self.gate_up_proj(x, context).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x, context), self.up_proj(x, context)
        return self.down_proj(self._ops.gated_activation(gate, up, kind=self._spec.activation), context)


class Block(nn.Module):
    def __init__(self, spec: specs.ModelSpec, index: int, take: Take, ops: Ops) -> None:
        super().__init__()
        layer, prefix = spec.layers[index], f"model.layers.{index}"

        def norm(name: str, settings: specs.Norm) -> RMSNorm:
            return RMSNorm(settings, f"{prefix}.{name}", take, ops)

        self._sandwich = layer.placement == "pre_post"
        if layer.attention_norm is not None:
            self.input_layernorm = norm("input_layernorm", layer.attention_norm)
        else:
            self.input_layernorm = nn.Identity()
        self.self_attn = Attention(spec, index, take, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm", layer.mlp_norm)
        if self._sandwich:
            self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm", layer.mlp_norm)
            self.post_feedforward_layernorm = norm("post_feedforward_layernorm", layer.mlp_norm)
        self.mlp = MLP(spec, index, take, ops)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), context)
        if not self._sandwich:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x), context)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), context))


def _add_linears(module: nn.Module, spec: specs.ModelSpec, index: int, part: str, take: Take, ops: Ops) -> None:
    for linear in layer_linears(spec, index):
        owner, _, name = linear.name.rpartition(".")
        if owner.endswith(f".{part}"):
            module.add_module(name, Linear(linear, take, ops))


def _dense(value: torch.Tensor | NF4) -> torch.Tensor:
    if isinstance(value, NF4):
        raise ValueError("only linear layers of the blocks may be quantized in a checkpoint")
    return value
