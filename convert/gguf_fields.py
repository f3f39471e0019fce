"""The metadata and the rotary factors of a model's GGUF file."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxsloth.convert.gguf_families import GgufFamily, context_length, family_of, is_plain_factors, swa_period
from jaxsloth.convert.gguf_types import OutType
from jaxsloth.models.rope import inverse_frequencies
from jaxsloth.models.spec import ModelSpec, Rope, RopeScaling

ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


def model_fields(spec: ModelSpec, name: str, kind: OutType) -> dict[str, Any]:
    """The metadata that describes the model.

    Raises:
        ValueError: llama.cpp would not compute what the model does.
    """
    family = family_of(spec)
    attention, rope = spec.layers[0].attention, far_rope(spec)
    assert spec.norm is not None
    fields = {
        "block_count": len(spec.layers),
        "context_length": context_length(spec, family),
        "embedding_length": spec.hidden,
        "feed_forward_length": spec.layers[0].mlp.width,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm.eps,
        "rope.freq_base": rope.theta,
        "rope.dimension_count": rope.rotary_dim,
        "vocab_size": spec.embedding.vocab,
        **_scaling_fields(spec, rope),
        **_window_fields(spec, family),
    }
    if family.architecture == "gemma2":
        fields |= {"attn_logit_softcapping": attention.soft_cap, "final_logit_softcapping": spec.head.soft_cap}
    own = {f"{family.architecture}.{key}": value for key, value in fields.items()}
    general = {"name": name, "file_type": kind.file_type, "quantization_version": 2}
    return {f"general.{key}": value for key, value in general.items()} | own


def far_rope(spec: ModelSpec) -> Rope:
    """The rope of the layers without windows, where there are such."""
    ropes = [(layer.attention.window is not None, layer.attention.rope) for layer in spec.layers]
    return next(rope for _, rope in sorted(ropes, key=lambda pair: pair[0]) if rope is not None)


def _window_fields(spec: ModelSpec, family: GgufFamily) -> dict[str, Any]:
    """Where the layers' windows are, and their rope; phi3's, which llama.cpp does not heed, for other readers."""
    sliding = [layer.attention for layer in spec.layers if layer.attention.window is not None]
    if not sliding or (family.swa_period is None and family.architecture != "phi3"):
        return {}
    fields: dict[str, Any] = {"attention.sliding_window": sliding[0].window}
    period = swa_period(spec)
    if family.swa_period not in (None, period):
        fields["attention.sliding_window_pattern"] = period
    if family.architecture == "gemma3" and sliding[0].rope is not None:
        fields["rope.freq_base_swa"] = sliding[0].rope.theta
    return fields


def _scaling_fields(spec: ModelSpec, rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None or scaling.kind == "llama3" or is_plain_factors(spec):
        return {}
    fields: dict[str, Any] = {}
    original = scaling.original_max_positions
    if scaling.kind == "longrope":
        # llama.cpp takes the long factors where the context that it is run with is longer than this.
        fields["rope.scaling.original_context_length"] = original or spec.max_positions
        fields["rope.scaling.attn_factor"] = inverse_frequencies(rope, max_positions=spec.max_positions)[1]
        return fields
    fields |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if original is not None or scaling.kind == "yarn":
        fields["rope.scaling.original_context_length"] = original or spec.max_positions
    if scaling.kind == "yarn":
        factor = inverse_frequencies(rope, max_positions=spec.max_positions)[1] / yarn_attention(scaling.factor)
        if not math.isclose(factor, 1.0, rel_tol=1e-6):
            fields["rope.scaling.attn_factor"] = factor
        betas = {"yarn_beta_fast": scaling.beta_fast, "yarn_beta_slow": scaling.beta_slow}
        fields |= {f"rope.scaling.{key}": float(beta) for key, beta in betas.items() if beta is not None}
    return fields


def yarn_attention(factor: float) -> float:
    """What llama.cpp multiplies cos and sin by itself where frequencies are stretched by yarn."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_factors(spec: ModelSpec) -> dict[str, np.ndarray]:
    """What each rotary frequency is divided by, float32 by the tensor's name: how llama.cpp stores Llama 3.1's scaling, and
    longrope's for short and for long contexts. None for other models."""
    rope = far_rope(spec)
    scaling = rope.scaling
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return {}
    if scaling.kind == "longrope" and not is_plain_factors(spec):
        pairs = ((LONG_FACTORS, scaling.long_factor), (SHORT_FACTORS, scaling.short_factor))
        return {name: np.array(factors, np.float32) for name, factors in pairs}
    return {ROPE_FACTORS: _divisors(rope, scaling, spec.max_positions)}


def _divisors(rope: Rope, scaling: RopeScaling, max_positions: int) -> np.ndarray:
    if scaling.kind == "longrope":
        return np.array(scaling.short_factor, np.float32)
    scaled = np.asarray(inverse_frequencies(rope, max_positions=max_positions, length=1)[0], np.float64)
    plain = rope.theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
    return (plain / scaled).astype(np.float32)


def notes_on(spec: ModelSpec) -> list[str]:
    """What a user should know of the file."""
    family = family_of(spec)
    length = context_length(spec, family)
    if length == spec.max_positions:
        return []
    return [
        f"llama.cpp has no windows in {family.architecture} models: the file's context is the window's {length} tokens of "
        f"{spec.max_positions}, in which all attend as the model does"
    ]
