"""LayerNorm in plain JAX, keeping two float32 numbers a row beside its inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    return _forward(x, weight, bias, eps)[0]


def _forward(x: Array, weight: Array, bias: Array | None, eps: float) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = centred * rstd * weight.astype(jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype), (x, weight, bias, mean, rstd)


def _backward(eps: float, kept: Any, dy: Array) -> tuple[Array, Array, Array | None]:
    del eps
    x, weight, bias, mean, rstd = kept
    wide, n = dy.astype(jnp.float32), (x.astype(jnp.float32) - mean) * rstd
    g = wide * weight.astype(jnp.float32)
    dx = rstd * (g - jnp.mean(g, axis=-1, keepdims=True) - n * jnp.mean(g * n, axis=-1, keepdims=True))
    dweight = (wide * n).reshape(-1, x.shape[-1]).sum(axis=0).astype(weight.dtype)
    dbias = None if bias is None else wide.reshape(-1, x.shape[-1]).sum(axis=0).astype(bias.dtype)
    return dx.astype(x.dtype), dweight, dbias


_layer_norm.defvjp(_forward, _backward)


def layer_norm(
    x: Float[Array, "*lead hidden"], weight: Float[Array, " hidden"], bias: Float[Array, " hidden"] | None = None, *, eps: float
) -> Float[Array, "*lead hidden"]:
    """Normalise the last axis to mean 0 and variance 1, scale by `weight` and shift by `bias`; x's dtype is kept."""
    return _layer_norm(x, weight, bias, eps)
