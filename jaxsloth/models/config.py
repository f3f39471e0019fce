"""Reading Hugging Face configs: fields that must be there, and rotary settings in their old and new spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from jaxsloth.models.spec import ActivationName, Rope, RopeScaling, ScalingKind

# Hugging Face's activation names -> ours. "gelu" is the exact one; the others approximate it by tanh.
ACTIVATIONS: dict[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def integer(config: Mapping[str, Any], name: str) -> int:
    """A positive integer field; ValueError names it where it is missing or something else."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"config.json: {name} must be a positive integer, and {value!r} came")
    return value


def number(config: Mapping[str, Any], name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {name} must be a number, and {value!r} came")
    return float(value)


def activation(config: Mapping[str, Any], name: str = "hidden_act") -> ActivationName:
    value = config.get(name)
    if value not in ACTIVATIONS:
        raise ValueError(f"config.json: {name} must be one of {sorted(ACTIVATIONS)}, and {value!r} came")
    return ACTIVATIONS[value]


def token_ids(value: Any) -> tuple[int, ...]:
    """An id, a list of ids, or None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def rope_of(config: Mapping[str, Any], head_dim: int, default_theta: float = 10000.0) -> Rope:
    """The rotary settings, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4 and before)."""
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or default_theta)
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return Rope(theta=theta, rotary_dim=int(head_dim * partial), scaling=_scaling(config, parameters))


def _scaling(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> RopeScaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    if kind == "su":  # Phi-3's first name of longrope
        kind = "longrope"
    if kind not in get_args(ScalingKind):
        raise ValueError(f"config.json: rope_type must be one of {['default', *get_args(ScalingKind)]}, and {kind!r} came")
    original = parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    factor = parameters.get("factor")
    if factor is None and kind in ("yarn", "longrope") and original:
        factor = config["max_position_embeddings"] / original
    if not isinstance(factor, int | float) or factor < 1.0:
        raise ValueError(f"config.json: rope scaling {kind!r} needs a factor of at least 1, and {factor!r} came")
    short, long = parameters.get("short_factor"), parameters.get("long_factor")
    return RopeScaling(
        kind=kind,
        factor=float(factor),
        original_max_positions=original,
        low_freq_factor=parameters.get("low_freq_factor"),
        high_freq_factor=parameters.get("high_freq_factor"),
        beta_fast=parameters.get("beta_fast"),
        beta_slow=parameters.get("beta_slow"),
        attention_factor=parameters.get("attention_factor"),
        mscale=parameters.get("mscale"),
        mscale_all_dim=parameters.get("mscale_all_dim"),
        truncate=parameters.get("truncate", True),
        short_factor=None if short is None else tuple(short),
        long_factor=None if long is None else tuple(long),
    )
