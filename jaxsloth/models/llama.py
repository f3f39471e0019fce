"""Llama 2, 3, 3.1, 3.2, SmolLM and SmolLM2: pre-norm, RMSNorm, SwiGLU, grouped heads, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxsloth.models.config import activation, integer, number, rope_of, token_ids
from jaxsloth.models.spec import Attention, Block, Embedding, Head, Mlp, ModelSpec, Norm

ARCHITECTURES = ("LlamaForCausalLM",)


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Hugging Face ``LlamaConfig`` as a dict.

    Raises:
        ValueError: a field is missing, of another type, or sizes do not fit each other.
    """
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    head_dim = integer(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    norm = Norm(kind="rms", eps=number(config, "rms_norm_eps"))
    bias = bool(config.get("attention_bias", False))
    block = Block.pre_norm(
        attention=Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=rope_of(config, head_dim),
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=Mlp(
            width=integer(config, "intermediate_size"),
            activation=activation(config),
            bias=bool(config.get("mlp_bias", False)),
        ),
        norm=norm,
    )
    return ModelSpec(
        family="llama",
        hidden=hidden,
        layers=(block,) * integer(config, "num_hidden_layers"),
        embedding=Embedding(vocab=integer(config, "vocab_size")),
        norm=norm,
        head=Head(tied=bool(config.get("tie_word_embeddings", False))),
        max_positions=integer(config, "max_position_embeddings"),
        bos_id=config.get("bos_token_id"),
        eos_ids=token_ids(config.get("eos_token_id")),
        pad_id=config.get("pad_token_id"),
    )
