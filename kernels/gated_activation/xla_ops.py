"""Gated activation in plain JAX, keeping gate and up only."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsloth.kernels.gated_activation.contract import KINDS

CUBIC = 0.044715


def activate(gate: Array, kind: str) -> Array:
    """act(gate) of a float32 gate."""
    if kind == "silu":
        return gate * jax.nn.sigmoid(gate)
    if kind == "relu":
        return jnp.maximum(gate, 0.0)
    if kind == "gelu":
        return 0.5 * gate * jax.lax.erfc(gate * -math.sqrt(0.5))
    return 0.5 * gate * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (gate + CUBIC * gate**3)))


def derivative(gate: Array, kind: str) -> Array:
    """act'(gate) of a float32 gate."""
    if kind == "silu":
        sigmoid = jax.nn.sigmoid(gate)
        return sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if kind == "relu":
        return (gate > 0).astype(jnp.float32)
    if kind == "gelu":
        density = jnp.exp(-0.5 * gate * gate) / math.sqrt(2.0 * math.pi)
        return 0.5 * jax.lax.erfc(gate * -math.sqrt(0.5)) + gate * density
    root = math.sqrt(2.0 / math.pi)
    tanh = jnp.tanh(root * (gate + CUBIC * gate**3))
    return 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * CUBIC * gate * gate)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated_activation(gate: Array, up: Array, kind: str) -> Array:
    return activate(gate.astype(jnp.float32), kind).astype(gate.dtype) * up


def _forward(gate: Array, up: Array, kind: str) -> tuple[Array, Any]:
    return _gated_activation(gate, up, kind), (gate, up)


def _backward(kind: str, kept: Any, dy: Array) -> tuple[Array, Array]:
    gate, up = kept
    wide, dy = gate.astype(jnp.float32), dy.astype(jnp.float32)
    return (dy * up * derivative(wide, kind)).astype(gate.dtype), (dy * activate(wide, kind)).astype(up.dtype)


_gated_activation.defvjp(_forward, _backward)


def gated_activation(
    gate: Float[Array, "*lead width"], up: Float[Array, "*lead width"], *, kind: str
) -> Float[Array, "*lead width"]:
    """``act(gate) * up`` in their dtype, act in float32.

    Raises:
        ValueError: kind is not one of the contract's `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    return _gated_activation(gate, up, kind)
