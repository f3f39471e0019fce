"""RMSNorm in plain JAX, keeping one float32 number a row beside its inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rms_norm(x: Array, weight: Array, eps: float, offset: float) -> Array:
    return _forward(x, weight, eps, offset)[0]


def _forward(x: Array, weight: Array, eps: float, offset: float) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normalised = wide * rstd
    if offset == 0.0:
        y = (normalised.astype(x.dtype) * weight).astype(x.dtype)
    else:
        y = (normalised * (offset + weight.astype(jnp.float32))).astype(x.dtype)
    return y, (x, weight, rstd)


def _backward(eps: float, offset: float, kept: Any, dy: Array) -> tuple[Array, Array]:
    del eps
    x, weight, rstd = kept
    wide, n = dy.astype(jnp.float32), x.astype(jnp.float32) * rstd
    g = wide * (offset + weight.astype(jnp.float32))
    dx = (rstd * (g - n * jnp.mean(g * n, axis=-1, keepdims=True))).astype(x.dtype)
    dweight = (wide * n).reshape(-1, x.shape[-1]).sum(axis=0).astype(weight.dtype)
    return dx, dweight


_rms_norm.defvjp(_forward, _backward)


def rms_norm(
    x: Float[Array, "*lead hidden"], weight: Float[Array, " hidden"], *, eps: float, offset: float = 0.0
) -> Float[Array, "*lead hidden"]:
    """Normalise the last axis to a root mean square of one and scale it by ``offset + weight``; x's dtype is kept."""
    return _rms_norm(x, weight, eps, offset)
