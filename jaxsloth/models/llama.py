"""Llama 2, 3, 3.1, 3.2, SmolLM and SmolLM2: pre-norm, RMSNorm, SwiGLU, grouped heads, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsloth.models.config import ACTIVATIONS, only_id, read_fields, rope_of, token_ids
from jaxsloth.models.spec import Attention, Block, Embedding, Head, Mlp, ModelSpec, Norm

ARCHITECTURES = ("LlamaForCausalLM",)


def spec_from_config(config: Mapping[str, Any], where: str | Path = "config.json") -> ModelSpec:
    """The spec of a Hugging Face ``LlamaConfig`` as a dict.

    Raises:
        ConfigError: a field is missing, of another type, or sizes do not fit each other.
    """
    fields = read_fields(config, where)
    head_dim = fields.head_dim or fields.hidden_size // fields.num_attention_heads
    norm = Norm(kind="rms", eps=fields.rms_norm_eps)
    block = Block.pre_norm(
        attention=Attention(
            heads=fields.num_attention_heads,
            kv_heads=fields.num_key_value_heads or fields.num_attention_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope_of(fields, head_dim, where),
            qkv_bias=fields.attention_bias,
            out_bias=fields.attention_bias,
        ),
        mlp=Mlp(width=fields.intermediate_size, activation=ACTIVATIONS[fields.hidden_act], bias=fields.mlp_bias),
        norm=norm,
    )
    return ModelSpec(
        family="llama",
        hidden=fields.hidden_size,
        layers=(block,) * fields.num_hidden_layers,
        embedding=Embedding(vocab=fields.vocab_size),
        norm=norm,
        head=Head(tied=fields.tie_word_embeddings),
        max_positions=fields.max_position_embeddings,
        bos_id=only_id(fields.bos_token_id),
        eos_ids=token_ids(fields.eos_token_id),
        pad_id=only_id(fields.pad_token_id),
    )
