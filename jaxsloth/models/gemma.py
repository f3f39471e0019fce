"""Gemma 1, 2 and 3 (text): norms with 1 + weight, scaled embeddings, GELU by tanh; 2: norms behind the sublayers too, soft caps
and alternating windows; 3: norms on q and k, a window in five of six layers, and rotary positions of their own there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxsloth.foreign import Positive, Size, checked
from jaxsloth.models.config import Activation, PadId, TokenIds, WindowedFields, make_rope, read_fields, rope_of, windows
from jaxsloth.models.decoder import attention_of, decoder_spec, mlp_of, rms_norm
from jaxsloth.models.spec import Block, ModelSpec, Rope

_PLUS_ONE = 1.0
_KINDS_OF_ROPE = ("sliding_attention", "full_attention")


class GemmaFields(WindowedFields):
    """Of ``GemmaConfig``. "gelu" is meant to be its approximation by tanh."""

    head_dim: Size | None = 256
    hidden_act: Activation = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    bos_token_id: TokenIds | None = 2
    eos_token_id: TokenIds | None = 1
    pad_token_id: PadId | None = 0


class Gemma2Fields(GemmaFields):
    """Of ``Gemma2Config``."""

    hidden_activation: Activation = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Positive = 256
    sliding_window: Size | None = 4096
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0


class Gemma3Fields(Gemma2Fields):
    """Of ``Gemma3TextConfig``. rope_local_base_freq: theta of the layers with windows."""

    sliding_window_pattern: Annotated[int, checked("a positive integer", lambda v: isinstance(v, int) and v > 0)] = 6
    rope_local_base_freq: Annotated[float, checked("a number above 1", lambda v: isinstance(v, int | float) and v > 1)] = (
        10000.0
    )
    attn_logit_softcapping: Positive | None = None  # transformers' Gemma 3 does not use it
    final_logit_softcapping: Positive | None = None


def gemma(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``GemmaConfig``: the first Gemma."""
    fields = read_fields(config, where, GemmaFields)
    attention = attention_of(fields, rope=rope_of(fields, fields.size_of_head, where), bias=fields.attention_bias)
    activation = "gelu_tanh" if fields.hidden_act == "gelu" else None
    mlp = mlp_of(fields, bias=False, **({"activation": activation} if activation else {}))
    return _whole("gemma", fields, (Block.pre_norm(attention, mlp, rms_norm(fields, _PLUS_ONE)),) * fields.num_hidden_layers)


def gemma2(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``Gemma2Config``."""
    fields = read_fields(config, where, Gemma2Fields)
    rope = rope_of(fields, fields.size_of_head, where)
    found = windows(fields, lambda index: index % 2 == 0, where)
    return _sandwiched("gemma2", fields, [(window, rope) for window in found], soft_cap=fields.attn_logit_softcapping)


def gemma3(config: Mapping[str, Any], where: str | Path) -> ModelSpec:
    """The spec of a Hugging Face ``Gemma3TextConfig``."""
    fields = read_fields(config, where, Gemma3Fields)
    found = windows(fields, lambda index: (index + 1) % fields.sliding_window_pattern != 0, where)
    near, far = _ropes(fields, where)
    layers = [(window, far if window is None else near) for window in found]
    return _sandwiched("gemma3_text", fields, layers, qk_norm=rms_norm(fields, _PLUS_ONE))


def _ropes(fields: Gemma3Fields, where: str | Path) -> tuple[Rope, Rope]:
    """Those of the layers with windows and of the others: from rope_parameters, which has a part for each (transformers 5), or
    from rope_local_base_freq, and rope_theta with rope_scaling."""
    given, head_dim = fields.rope_parameters or {}, fields.size_of_head
    near, far = ({} if given.get(kind) is None else given[kind] for kind in _KINDS_OF_ROPE)
    far = far | (fields.rope_scaling or {})
    place = f"{where}: rope_parameters"
    return (
        make_rope(fields, near, head_dim, f"{place}.{_KINDS_OF_ROPE[0]}", fields.rope_local_base_freq),
        make_rope(fields, far, head_dim, f"{place}.{_KINDS_OF_ROPE[1]}", fields.rope_theta or 1e6),
    )


def _sandwiched(family: str, fields: Gemma2Fields, layers: list[tuple[int | None, Rope]], **attention: Any) -> ModelSpec:
    """layers: each one's window and rope; attention: other fields of `Attention`."""
    norm = rms_norm(fields, _PLUS_ONE)
    mlp = mlp_of(fields.model_copy(update={"hidden_act": fields.hidden_activation}), bias=False)
    blocks = (
        Block.sandwich(
            attention_of(
                fields,
                rope=rope,
                bias=fields.attention_bias,
                scale=fields.query_pre_attn_scalar**-0.5,
                window=window,
                **attention,
            ),
            mlp,
            norm,
        )
        for window, rope in layers
    )
    return _whole(family, fields, tuple(blocks), fields.final_logit_softcapping)


def _whole(family: str, fields: GemmaFields, layers: tuple[Block, ...], soft_cap: float | None = None) -> ModelSpec:
    return decoder_spec(
        family,
        fields,
        layers,
        weight_offset=_PLUS_ONE,
        embedding_scale=fields.hidden_size**0.5,
        logits_soft_cap=soft_cap,
    )
