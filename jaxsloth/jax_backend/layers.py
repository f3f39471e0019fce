"""The blocks of a decoder as nnx modules under Hugging Face names; each calls the ops that the registry chose.

Blocks that repeat are stored once, their arrays stacked ``[layers, …]``. Inside a pass a block is given the index of its layer:
frozen arrays are read in place at that index, and what is trained arrives already sliced by the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.kernels.attention.contract import ATTENTION
from jaxsloth.kernels.attention.contract import sizes_of as attention_sizes
from jaxsloth.kernels.dropout.contract import module_word
from jaxsloth.kernels.gated_activation.contract import GATED_ACTIVATION
from jaxsloth.kernels.jax_platform import precision_of
from jaxsloth.kernels.linear_cross_entropy.contract import LINEAR_CROSS_ENTROPY
from jaxsloth.kernels.lora_matmul.contract import LORA_MATMUL, Dropout
from jaxsloth.kernels.nf4.contract import MATVEC, MATVEC_ROWS, Nested
from jaxsloth.kernels.nf4.xla_ops import NF4  # from here, since this module makes it a pytree
from jaxsloth.kernels.registry import Facts, Implementation, Op, resolve, select
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from jaxsloth.kernels.rope.contract import ROPE
from jaxsloth.models import spec as specs
from jaxsloth.models.names import layer_linears

Take = Callable[[str], Any]


class Frozen(nnx.Variable):
    """A base weight in the compute dtype."""


class Quantized(nnx.Variable):
    """Part of a base weight in NF4."""


class Adapter(nnx.Variable):
    """A LoRA weight, float32, trained."""


class Trained(nnx.Variable):
    """A bias or a whole module that is trained, float32."""


TRAINED = (Adapter, Trained)


class Ops:
    """The implementation of every op for one device and dtype, chosen once."""

    def __init__(self, facts: Facts, requested: Mapping[str, str]) -> None:
        def choose(op: Op) -> Callable[..., Any]:
            return resolve(op, "jax", facts, requested.get(op.name))

        self.gated_activation = choose(GATED_ACTIVATION)
        self.linear_cross_entropy = choose(LINEAR_CROSS_ENTROPY)
        self.lora_matmul = choose(LORA_MATMUL)
        self.rope = choose(ROPE)
        self._rms_norm = choose(RMS_NORM)
        # For as many rows as a matvec takes: XLA joins their norm, residual sum and weight's slice (docs/performance.md).
        self._rms_norm_of_few = resolve(RMS_NORM, "jax", facts, requested.get(RMS_NORM.name, "xla"))
        self._facts, self._matvec = facts, requested.get(MATVEC.name)
        self._attention = requested.get(ATTENTION.name)

    def rms_norm(self, x: Any, weight: Any, **options: Any) -> Any:
        few = x.size <= MATVEC_ROWS * x.shape[-1]
        return (self._rms_norm_of_few if few else self._rms_norm)(x, weight, **options)

    def attention(self, spec: specs.Attention) -> Implementation:
        """Which one depends on the layer."""
        facts = replace(self._facts, sizes=attention_sizes(spec.head_dim, spec.soft_cap))
        return select(ATTENTION, "jax", facts, self._attention).implementation

    def matvec(self, rows: int, shape: tuple[int, int]) -> Callable[..., Any] | None:
        """nf4_matvec for x of so many rows and a weight of this shape; None where `lora_matmul` does no worse."""
        sizes = {"rows": rows, "in": shape[1], "values": shape[0] * shape[1]}
        chosen = select(MATVEC, "jax", replace(self._facts, sizes=sizes), self._matvec).implementation
        return None if chosen.name == "xla" and self._matvec is None else chosen.load()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The keys and values of one layer, ``[batch, capacity, kv_heads, head_dim]``."""

    keys: Any
    values: Any

    def append(self, keys: Any, values: Any, used: Any) -> Cache:
        """The cache with slots ``used …`` written."""
        return Cache(
            jax.lax.dynamic_update_slice_in_dim(self.keys, keys, used, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.values, values, used, axis=1),
        )


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    tables: (cos, sin) a rotary setting. segments: int32 ``[batch, length]``, kv_segments likewise for the keys where they
    differ (the cache's slots, of which `used` are written). dropout_words: uint32 ``[2]``, the step's key, or None outside
    training; rows: int32 ``[batch]``. noise: what is added to the embeddings, float32 ``[batch, length, hidden]``. decoding:
    one token a row, and no gradient is wanted.
    """

    tables: Mapping[specs.Rope, tuple[Any, Any]]
    segments: Any
    kv_segments: Any = None
    used: Any = 0
    rows: Any = None
    dropout_words: Any = None
    noise: Any = None
    decoding: bool = False


class RMSNorm(nnx.Module):
    def __init__(self, norm: specs.Norm, name: str, take: Take, ops: Ops) -> None:
        self.weight = Frozen(take(f"{name}.weight"))
        self._eps, self._offset, self._ops = norm.eps, norm.weight_offset, ops

    def __call__(self, x: Any, layer: Any = None) -> Any:
        weight = self.weight[...] if layer is None else self.weight[...][layer]
        return self._ops.rms_norm(x, weight, eps=self._eps, offset=self._offset)


class Linear(nnx.Module):
    """A frozen linear layer, dense or NF4, with or without an adapter; all arrays stacked ``[layers, …]``.

    `weight` is the dense weight ``[layers, out, in]`` or, where the base is quantized, its NF4 codes. names: the layer's
    Hugging Face name in each of the stacked blocks.
    """

    def __init__(self, linear: specs.Linear, names: tuple[str, ...], lora: specs.Lora | None, take: Take, ops: Ops) -> None:
        self._ops = ops
        self._shape = (linear.out_features, linear.in_features)
        weight = take(f"{linear.name}.weight")
        self._quantized = isinstance(weight, NF4)
        if isinstance(weight, NF4):
            self.weight = Quantized(weight.codes)
            self.weight_absmax = Quantized(weight.absmax)
            self._nested = weight.nested is not None
            if weight.nested is not None:
                self.weight_nested_absmax = Quantized(weight.nested.absmax)
                self.weight_nested_offset = Quantized(weight.nested.offset)
                self.weight_nested_code = Quantized(weight.nested.code)
        else:
            self.weight = Frozen(weight)
        self._biased = linear.bias
        if linear.bias:
            bias = take(f"{linear.name}.bias")
            self.bias = bias if isinstance(bias, Trained) else Frozen(bias)
        # Where only some blocks of the stack have an adapter, the others' are zero, and gradients keep them so.
        self._adapted = lora is not None and any(name in lora.modules for name in names)
        if lora is not None and self._adapted:
            self.lora_A = Adapter(take(f"{linear.name}.lora_A"))
            self.lora_B = Adapter(take(f"{linear.name}.lora_B"))
            self._scale, self._rate = lora.scale, lora.dropout
            self._words = tuple(module_word(name) for name in names)

    def base(self) -> Any:
        """The frozen weights, stacked, as the op takes them."""
        if not self._quantized:
            return self.weight[...]
        nested = None
        if self._nested:
            nested = Nested(self.weight_nested_absmax[...], self.weight_nested_offset[...], self.weight_nested_code[...])
        return NF4(self.weight[...], self.weight_absmax[...], nested, self._shape)

    def __call__(self, x: Any, context: Context, layer: Any) -> Any:
        bias = None
        if self._biased:
            bias = self.bias[...] if isinstance(self.bias, Trained) else self.bias[...][layer]
        if context.decoding and self._quantized:
            matvec = self._ops.matvec(x.shape[0] * x.shape[1], self._shape)
            if matvec is not None:
                return self._decode(matvec, x, bias, layer)
        if not self._adapted:
            return self._ops.lora_matmul(x, self.base(), bias=bias, layer=layer)
        dropout = None
        if self._rate and context.dropout_words is not None:
            word = jnp.array(self._words, jnp.uint32)[layer]
            key = jnp.stack([context.dropout_words[0] ^ word, context.dropout_words[1]])
            dropout = Dropout(self._rate, key, context.rows)
        return self._ops.lora_matmul(
            x,
            self.base(),
            self.lora_A[...],
            self.lora_B[...],
            scale=self._scale,
            bias=bias,
            dropout=dropout,
            layer=layer,
        )

    def _decode(self, matvec: Callable[..., Any], x: Any, bias: Any, layer: Any) -> Any:
        """As `lora_matmul`, without writing the dequantized weight."""
        flat = x.reshape(-1, x.shape[-1])
        y = matvec(flat, [self.base()], layer=layer)
        if self._adapted:
            a, b = self.lora_A[...].astype(x.dtype), (self._scale * self.lora_B[...]).astype(x.dtype)
            precision = precision_of(x.dtype)
            low = jnp.einsum("ti,ri->tr", flat, a, precision=precision)
            y = y + jnp.einsum("tr,or->to", low, b, precision=precision)
        if bias is not None:
            y = y + bias.astype(y.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class Place:
    """Where a stack of blocks stands: its first block's index, and the names of them all."""

    spec: specs.ModelSpec
    index: int
    period: int

    def names_of(self, linear: specs.Linear) -> tuple[str, ...]:
        """A linear layer's name in every block of the stack."""
        tail = linear.name.split(".", 3)[3]
        return tuple(f"model.layers.{i}.{tail}" for i in range(self.index, len(self.spec.layers), self.period))

    def linears(self, part: str) -> dict[str, specs.Linear]:
        found = {}
        for linear in layer_linears(self.spec, self.index):
            owner, _, name = linear.name.rpartition(".")
            if owner.endswith(f".{part}"):
                found[name] = linear
        return found


class Attention(nnx.Module):
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    qkv_proj: Linear
    o_proj: Linear

    def __init__(self, place: Place, take: Take, ops: Ops) -> None:
        attention, prefix = place.spec.layers[place.index].attention, f"model.layers.{place.index}.self_attn"
        self._spec, self._ops = attention, ops
        self._implementation = ops.attention(attention)
        _add_linears(self, place, "self_attn", take, ops)
        if attention.qk_norm is not None:
            self.q_norm = RMSNorm(attention.qk_norm, f"{prefix}.q_norm", take, ops)
            self.k_norm = RMSNorm(attention.qk_norm, f"{prefix}.k_norm", take, ops)

    def __call__(self, x: Any, context: Context, layer: Any, cache: Cache | None) -> tuple[Any, Cache | None]:
        spec, (batch, length) = self._spec, x.shape[:2]
        q, k, v = (t.reshape(batch, length, -1, spec.head_dim) for t in self._project(x, context, layer))
        if spec.qk_norm is not None:
            q, k = self.q_norm(q, layer), self.k_norm(k, layer)
        if spec.rope is not None:
            cos, sin = context.tables[spec.rope]
            q, k = self._ops.rope(q, cos, sin), self._ops.rope(k, cos, sin)
        offset, kv_segments = 0, context.segments if context.kv_segments is None else context.kv_segments
        if cache is not None:
            cache = cache.append(k, v, context.used)
            k, v, offset, kv_segments = cache.keys, cache.values, context.used, context.kv_segments
        out = self._implementation.load()(
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
        return self.o_proj(out.reshape(batch, length, -1), context, layer), cache

    def _project(self, x: Any, context: Context, layer: Any) -> tuple[Any, ...]:
        spec = self._spec
        if spec.fused_qkv:
            q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
            return tuple(jnp.split(self.qkv_proj(x, context, layer), [q_width, q_width + kv_width], axis=-1))
        return self.q_proj(x, context, layer), self.k_proj(x, context, layer), self.v_proj(x, context, layer)


class MLP(nnx.Module):
    gate_proj: Linear
    up_proj: Linear
    gate_up_proj: Linear
    down_proj: Linear

    def __init__(self, place: Place, take: Take, ops: Ops) -> None:
        self._spec, self._ops = place.spec.layers[place.index].mlp, ops
        _add_linears(self, place, "mlp", take, ops)

    def __call__(self, x: Any, context: Context, layer: Any) -> Any:
        if self._spec.fused:
            gate, up = jnp.split(self.gate_up_proj(x, context, layer), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x, context, layer), self.up_proj(x, context, layer)
        return self.down_proj(self._ops.gated_activation(gate, up, kind=self._spec.activation), context, layer)


class Block(nnx.Module):
    def __init__(self, place: Place, take: Take, ops: Ops) -> None:
        layer, prefix = place.spec.layers[place.index], f"model.layers.{place.index}"

        def norm(name: str, settings: specs.Norm) -> RMSNorm:
            return RMSNorm(settings, f"{prefix}.{name}", take, ops)

        self._spec, self._sandwich = layer, layer.placement == "pre_post"
        self._normed = layer.attention_norm is not None
        if layer.attention_norm is not None:
            self.input_layernorm = norm("input_layernorm", layer.attention_norm)
        self.self_attn = Attention(place, take, ops)
        self.post_attention_layernorm = norm("post_attention_layernorm", layer.mlp_norm)
        if self._sandwich:
            self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm", layer.mlp_norm)
            self.post_feedforward_layernorm = norm("post_feedforward_layernorm", layer.mlp_norm)
        self.mlp = MLP(place, take, ops)

    def groups(self) -> tuple[list[Linear], list[Linear], list[Linear], list[Linear]]:
        """The linear layers by the input they share: queries, keys and values; o_proj; gate and up; down_proj."""
        attention, mlp = self.self_attn, self.mlp
        qkv = [attention.qkv_proj] if attention._spec.fused_qkv else [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up = [mlp.gate_up_proj] if mlp._spec.fused else [mlp.gate_proj, mlp.up_proj]
        return qkv, [attention.o_proj], gate_up, [mlp.down_proj]

    def __call__(self, x: Any, context: Context, layer: Any, cache: Cache | None = None) -> tuple[Any, Cache | None]:
        normed = self.input_layernorm(x, layer) if self._normed else x
        attended, cache = self.self_attn(normed, context, layer, cache)
        if not self._sandwich:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x, layer), context, layer), cache
        x = x + self.post_attention_layernorm(attended, layer)
        fed = self.mlp(self.pre_feedforward_layernorm(x, layer), context, layer)
        return x + self.post_feedforward_layernorm(fed, layer), cache


def _add_linears(module: nnx.Module, place: Place, part: str, take: Take, ops: Ops) -> None:
    for name, linear in place.linears(part).items():
        setattr(module, name, Linear(linear, place.names_of(linear), place.spec.lora, take, ops))
