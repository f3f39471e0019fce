"""What decoders' configs have in common, as parts of a spec: a family's file says only what is different."""

from __future__ import annotations

from typing import Any

from jaxsloth.models.config import ACTIVATIONS, DecoderFields, only_id, token_ids
from jaxsloth.models.spec import Attention, Block, Embedding, Head, Mlp, ModelSpec, Norm, Rope


def rms_norm(fields: DecoderFields, weight_offset: float = 0.0) -> Norm:
    return Norm(kind="rms", eps=fields.rms_norm_eps, weight_offset=weight_offset)


def attention_of(fields: DecoderFields, *, rope: Rope | None, bias: bool = False, **changes: Any) -> Attention:
    """Grouped heads scaled by ``head_dim ** -0.5``. bias: of all four projections; changes: other fields of `Attention`."""
    settings: dict[str, Any] = {
        "heads": fields.num_attention_heads,
        "kv_heads": fields.num_key_value_heads or fields.num_attention_heads,
        "head_dim": fields.size_of_head,
        "scale": fields.size_of_head**-0.5,
        "rope": rope,
        "qkv_bias": bias,
        "out_bias": bias,
    }
    return Attention(**(settings | changes))


def mlp_of(fields: DecoderFields, **changes: Any) -> Mlp:
    """Gated; changes: fields of `Mlp`."""
    settings: dict[str, Any] = {"activation": ACTIVATIONS[fields.hidden_act], "bias": fields.mlp_bias}
    return Mlp(width=fields.intermediate_size, **(settings | changes))


def decoder_spec(
    family: str,
    fields: DecoderFields,
    layers: tuple[Block, ...],
    *,
    weight_offset: float = 0.0,
    embedding_scale: float = 1.0,
    logits_soft_cap: float | None = None,
) -> ModelSpec:
    """The whole model around its blocks. weight_offset: of the last norm."""
    return ModelSpec(
        family=family,
        hidden=fields.hidden_size,
        layers=layers,
        embedding=Embedding(vocab=fields.vocab_size, scale=embedding_scale),
        norm=rms_norm(fields, weight_offset),
        head=Head(tied=fields.tie_word_embeddings, soft_cap=logits_soft_cap),
        max_positions=fields.max_position_embeddings,
        bos_id=only_id(fields.bos_token_id),
        eos_ids=token_ids(fields.eos_token_id),
        pad_id=only_id(fields.pad_token_id),
    )
