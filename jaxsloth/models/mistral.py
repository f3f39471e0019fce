"""Mistral 7B and its kin: Llama whose layers may all see no further than a window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsloth.foreign import Size
from jaxsloth.models.config import TokenIds, WindowedFields, read_fields, rope_of
from jaxsloth.models.decoder import attention_of, decoder_spec, mlp_of, rms_norm
from jaxsloth.models.spec import Block, ModelSpec


class MistralFields(WindowedFields):
    """Of ``MistralConfig``, which knows no layer_types."""

    num_key_value_heads: Size | None = 8
    sliding_window: Size | None = 4096
    bos_token_id: TokenIds | None = 1
    eos_token_id: TokenIds | None = 2


def mistral(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``MistralConfig``."""
    fields = read_fields(config, where, MistralFields)
    attention = attention_of(fields, rope=rope_of(fields, fields.size_of_head, where), window=fields.sliding_window)
    block = Block.pre_norm(attention, mlp_of(fields, bias=False), rms_norm(fields))
    return decoder_spec("mistral", fields, (block,) * fields.num_hidden_layers)
