"""Qwen 2, 2.5 and 3: Llama with biases on q, k and v (2, 2.5), or with norms on q and k (3); windows where a config asks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxsloth.foreign import Size, checked
from jaxsloth.models.config import WindowedFields, read_fields, rope_of, windows
from jaxsloth.models.decoder import attention_of, decoder_spec, mlp_of, rms_norm
from jaxsloth.models.spec import Block, ModelSpec


class Qwen2Fields(WindowedFields):
    """Of ``Qwen2Config``. Layers from max_window_layers on have windows, if use_sliding_window."""

    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: Annotated[int, checked("a count of layers", lambda v: isinstance(v, int) and v >= 0)] = 28


class Qwen3Fields(Qwen2Fields):
    """Of ``Qwen3Config``."""

    head_dim: Size | None = 128


def qwen2(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``Qwen2Config``: Qwen 2 and 2.5."""
    fields = read_fields(config, where, Qwen2Fields)
    return _spec("qwen2", fields, where, qkv_bias=True)


def qwen3(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``Qwen3Config``: the dense Qwen 3."""
    fields = read_fields(config, where, Qwen3Fields)
    return _spec("qwen3", fields, where, bias=fields.attention_bias, qk_norm=rms_norm(fields))


def _spec(family: str, fields: Qwen2Fields, where: str | Path, **attention: Any) -> ModelSpec:
    rope = rope_of(fields, fields.size_of_head, where)
    if not fields.use_sliding_window:
        fields = fields.model_copy(update={"sliding_window": None})
    slides = fields.sliding_window is not None
    found = windows(fields, lambda index: slides and index >= fields.max_window_layers, where)
    layers = (
        Block.pre_norm(attention_of(fields, rope=rope, window=window, **attention), mlp_of(fields), rms_norm(fields))
        for window in found
    )
    return decoder_spec(family, fields, tuple(layers))
