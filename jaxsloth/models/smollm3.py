"""SmolLM3: Llama, some of whose layers have no rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxsloth.foreign import Size, checked
from jaxsloth.models.config import ConfigError, PadId, TokenIds, WindowedFields, read_fields, rope_of, windows
from jaxsloth.models.decoder import attention_of, decoder_spec, mlp_of, rms_norm
from jaxsloth.models.spec import Block, ModelSpec

_Flags = Annotated[
    list[int], checked("a list of 0 and 1", lambda v: isinstance(v, list | tuple) and all(flag in (0, 1) for flag in v))
]


class SmolLM3Fields(WindowedFields):
    """Of ``SmolLM3Config``. no_rope_layers: 1 where a layer has rotary positions, for all its name says."""

    num_key_value_heads: Size | None = 4
    use_sliding_window: bool = False
    no_rope_layers: _Flags | None = None
    no_rope_layer_interval: Annotated[int, checked("a positive integer", lambda v: isinstance(v, int) and v > 0)] = 4
    tie_word_embeddings: bool = True
    bos_token_id: TokenIds | None = 128000
    eos_token_id: TokenIds | None = 128001
    pad_token_id: PadId | None = 128004


def smollm3(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``SmolLM3Config``."""
    fields = read_fields(config, where, SmolLM3Fields)
    count = fields.num_hidden_layers
    flags = fields.no_rope_layers or [int((index + 1) % fields.no_rope_layer_interval != 0) for index in range(count)]
    if len(flags) < count:
        raise ConfigError(f"{where}: no_rope_layers must list num_hidden_layers ({count}) layers, got {len(flags)}")
    slides = fields.use_sliding_window and fields.sliding_window is not None
    found = windows(fields, lambda index: slides and not flags[index], where)
    rope = rope_of(fields, fields.size_of_head, where, default_theta=2000000.0)
    layers = (
        Block.pre_norm(
            attention_of(fields, rope=rope if flag else None, bias=fields.attention_bias, window=window),
            mlp_of(fields),
            rms_norm(fields),
        )
        for flag, window in zip(flags, found, strict=False)
    )
    return decoder_spec("smollm3", fields, tuple(layers))
