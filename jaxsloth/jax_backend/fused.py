"""The blocks of a pre-norm decoder over wide arrays, for training: `[tokens, width + room]` from end to end.

Same mathematics as layers.py; the linear layers that share an input are one product each way with their adapters as extra
columns (kernels/lora_matmul/pallas_kernel.py), norms take the residual stream along, gate and up are one array. What is kept
for the backward goes by name, so that `gradient_checkpointing` is a policy:

    none       everything but copies and the activation's product
    selective  the stream, q k v, attention's output and statistics; norms, gate and up are formed again
    offload    the same, in pinned host memory
    full       the blocks' inputs and attention's output, so that attention is not run twice
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxsloth.jax_backend.layers import TRAINED, Block, Context, Linear
from jaxsloth.kernels.attention import jax_library_ops as attention_ops
from jaxsloth.kernels.gated_activation.pallas_kernel import gated_merged
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.lora_matmul import pallas_kernel as wide
from jaxsloth.kernels.lora_matmul.pallas_kernel import ROOM, Group, lora_group
from jaxsloth.kernels.rms_norm.pallas_kernel import norm_fork
from jaxsloth.kernels.rope.xla_ops import rope
from jaxsloth.models import spec as specs
from jaxsloth.models.buildable import fused_refusal
from jaxsloth.models.names import layer_linears

if TYPE_CHECKING:
    from jaxsloth.jax_backend.decoder import Decoder

STREAM, MIDDLE, GATE_UP = "stream", "middle", "gate_up"
OUTPUTS = (attention_ops.ATTENDED, attention_ops.STATISTICS)
FEW = (STREAM, MIDDLE, *OUTPUTS, attention_ops.INPUTS)
MANY = (*FEW, GATE_UP, "qkv.input", "gate_up.input", "rstd")


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


def policy(mode: str) -> Any:
    """What `jax.checkpoint` keeps in a mode."""
    if mode == "full":
        return jax.checkpoint_policies.save_only_these_names(*OUTPUTS)
    if mode == "offload" and platform() == "cuda":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(FEW), offload_src="device", offload_dst="pinned_host"
        )
    return jax.checkpoint_policies.save_only_these_names(*(MANY if mode == "none" else FEW))


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
    x = jnp.pad(x, ((0, 0), (0, ROOM)))
    structure, trained, frozen = nnx.split(decoder.model.layers, TRAINED, ...)
    shape = input_ids.shape

    def period(x: Any, scanned: Any) -> tuple[Any, None]:
        layer, adapters = scanned
        for block in nnx.merge(structure, adapters, frozen):
            x = _block(block, x, shape, context, layer, documents, plain)
        return x, None

    count = len(decoder.spec.layers) // len(decoder.model.layers)
    if unrolled:
        body = jax.checkpoint(period, policy=policy(mode))
        for index in range(count):
            x, _ = body(x, (jnp.int32(index), jax.tree.map(lambda stack, index=index: stack[index], trained)))
    else:
        body = jax.checkpoint(period, policy=policy(mode), prevent_cse=False)
        x, _ = jax.lax.scan(body, x, (jnp.arange(count, dtype=jnp.int32), trained))
    return decoder.model.norm(x[:, : decoder.spec.hidden])


def _block(block: Block, x: Any, shape: tuple[int, int], context: Context, layer: Any, documents: Any, plain: bool) -> Any:
    attention, mlp = block.self_attn, block.mlp
    interpret = platform() != "cuda"
    x = checkpoint_name(x, STREAM)
    x, normed = _fork(block.input_layernorm, x, layer, interpret)
    projections = ("qkv_proj",) if attention._spec.fused_qkv else ("q_proj", "k_proj", "v_proj")
    qkv = _linears(attention, projections, normed, layer, "qkv")
    attended = _attend(attention._spec, qkv, shape, context, documents, plain)
    x = x + _linears(attention, ("o_proj",), jnp.pad(attended, ((0, 0), (0, ROOM))), layer, "o")
    x = checkpoint_name(x, MIDDLE)
    x, normed = _fork(block.post_attention_layernorm, x, layer, interpret)
    merged = _linears(mlp, ("gate_up_proj",) if mlp._spec.fused else ("gate_proj", "up_proj"), normed, layer, "gate_up")
    h = gated_merged(checkpoint_name(merged, GATE_UP), mlp._spec.width, mlp._spec.activation, ROOM, interpret)
    return x + _linears(mlp, ("down_proj",), h, layer, "down")


def _fork(norm: Any, x: Any, layer: Any, interpret: bool) -> tuple[Any, Any]:
    return norm_fork(x, norm.weight[...][layer], norm._eps, norm._offset, ROOM, interpret)


def _linears(owner: Any, names: tuple[str, ...], x: Any, layer: Any, name: str) -> Any:
    """The layers called `names` of a module, as one group."""
    linears: list[Linear] = [getattr(owner, each) for each in names]
    adapters = tuple((one.lora_A[...], one.lora_B[...]) if one._adapted else None for one in linears)
    group = Group(
        linears[0]._shape[1],
        tuple(one._shape[0] for one in linears),
        tuple(0 if pair is None else pair[0].shape[0] for pair in adapters),
        tuple(one._scale if one._adapted else 1.0 for one in linears),
        name,
        platform() != "cuda",
    )
    bias = None
    if any(one._biased for one in linears):
        parts = [one.bias[...][layer] if one._biased else jnp.zeros(one._shape[0], x.dtype) for one in linears]
        bias = jnp.concatenate(parts)
    return lora_group(group, x, tuple(one.base() for one in linears), adapters, bias, layer)


def _attend(spec: specs.Attention, qkv: Any, shape: tuple[int, int], context: Context, documents: Any, plain: bool) -> Any:
    """``[tokens, heads·head_dim]`` from the merged projection."""
    widths = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim)
    ends = (0, widths[0], widths[0] + widths[1], widths[0] + 2 * widths[1])
    q, k, v = (qkv[:, start:end].reshape(*shape, -1, spec.head_dim) for start, end in pairwise(ends))
    assert spec.rope is not None
    cos, sin = context.tables[spec.rope]
    reason = attention_ops.refuses(platform(), qkv.dtype, spec.head_dim, spec.causal, spec.soft_cap)
    out = attention_ops.attend(
        rope(q, cos, sin),
        rope(k, cos, sin),
        v,
        scale=spec.scale,
        causal=spec.causal,
        window=spec.window,
        soft_cap=spec.soft_cap,
        segments=context.segments,
        documents=documents,
        plain=plain,
        cudnn=reason is None,
    )
    return out.reshape(qkv.shape[0], -1)
