"""Rotary embedding in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


@jax.custom_vjp
def _rope(x: Array, cos: Array, sin: Array) -> Array:
    return _rotate(x, cos, sin)


def _forward(x: Array, cos: Array, sin: Array) -> tuple[Array, Any]:
    return _rotate(x, cos, sin), (cos, sin)


def _backward(kept: Any, dy: Array) -> tuple[Array, None, None]:
    cos, sin = kept
    return _rotate(dy, cos, -sin), None, None


_rope.defvjp(_forward, _backward)


def rope(
    x: Float[Array, "batch length heads head_dim"],
    cos: Float32[Array, "batch length half"],
    sin: Float32[Array, "batch length half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Turn the first ``2 * half`` channels of every head by the angles whose cosines and sines are given.

    Raises:
        ValueError: the tables turn more channels than a head has.
    """
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(f"the tables turn {2 * cos.shape[-1]} channels, and a head has {x.shape[-1]}")
    return _rope(x, cos, sin)


def tables(
    positions: Int[Array, "batch length"], inverse_frequencies: Float32[Array, " half"], attention_scaling: float = 1.0
) -> tuple[Float32[Array, "batch length half"], Float32[Array, "batch length half"]]:
    """Cosines and sines of ``position * inverse frequency``, times `attention_scaling`; angles are float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    return jnp.cos(angles) * attention_scaling, jnp.sin(angles) * attention_scaling
