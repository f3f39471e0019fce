"""Phi-3, 3.5 and 4: q, k and v in one weight, gate and up in another; a part of each head rotated, long contexts scaled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxsloth.foreign import Size
from jaxsloth.models.config import PadId, TokenIds, WindowedFields, read_fields, rope_of
from jaxsloth.models.decoder import attention_of, decoder_spec, mlp_of, rms_norm
from jaxsloth.models.spec import Block, ModelSpec


class Phi3Fields(WindowedFields):
    """Of ``Phi3Config``."""

    ROTATES_PARTS: ClassVar[bool] = True
    original_max_position_embeddings: Size | None = 4096
    bos_token_id: TokenIds | None = 1
    eos_token_id: TokenIds | None = 32000
    pad_token_id: PadId | None = 32000


def phi3(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``Phi3Config``."""
    fields = read_fields(config, where, Phi3Fields)
    # Early files call longrope "su" or "yarn".
    scaling = {
        key: "longrope" if key in ("type", "rope_type") and value == "yarn" else value
        for key, value in (fields.rope_scaling or {}).items()
    }
    rope = rope_of(fields.model_copy(update={"rope_scaling": scaling}), fields.size_of_head, where)
    attention = attention_of(fields, rope=rope, window=fields.sliding_window, fused_qkv=True)
    block = Block.pre_norm(attention, mlp_of(fields, bias=False, fused=True), rms_norm(fields))
    return decoder_spec("phi3", fields, (block,) * fields.num_hidden_layers)
