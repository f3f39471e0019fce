"""Llama 2, 3, 3.1, 3.2, SmolLM and SmolLM2: pre-norm, RMSNorm, SwiGLU, grouped heads, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsloth.models.config import DecoderFields, read_fields, rope_of
from jaxsloth.models.decoder import attention_of, decoder_spec, mlp_of, rms_norm
from jaxsloth.models.spec import Block, ModelSpec


def llama(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``LlamaConfig``."""
    fields = read_fields(config, where, DecoderFields)
    attention = attention_of(fields, rope=rope_of(fields, fields.size_of_head, where), bias=fields.attention_bias)
    block = Block.pre_norm(attention, mlp_of(fields), rms_norm(fields))
    return decoder_spec("llama", fields, (block,) * fields.num_hidden_layers)
