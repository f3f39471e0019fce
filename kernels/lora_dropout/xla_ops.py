"""LoRA's A behind a dropout in plain JAX; masks are drawn a module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from jaxsloth.kernels.dropout.contract import kept_scale
from jaxsloth.kernels.dropout.xla_ops import keep_tokens
from jaxsloth.kernels.jax_platform import dot_float32
from jaxsloth.kernels.lora_dropout.contract import Masks

jax.tree_util.register_dataclass(
    Masks, data_fields=["key", "modules", "rows"], meta_fields=["rate", "ranks", "length", "first"]
)


def keeps(masks: Masks, tokens: int, channels: int) -> Iterator[tuple[slice, Bool[Array, "tokens in"]]]:
    """Each module's columns of xa, and what of x it keeps."""
    flat = masks.first + jnp.arange(tokens, dtype=jnp.int32)
    rows, positions = masks.rows[flat // masks.length], flat % masks.length
    for index, place in enumerate(masks.places):
        key = jnp.stack([masks.key[0] ^ masks.modules[index], masks.key[1]])
        yield place, keep_tokens(key, rows, positions, channels, rate=masks.rate)


def project(
    x: Float[Array, "tokens wide"], a_packed: Float[Array, "pad in"], masks: Masks, *, interpret: bool = False
) -> Float[Array, "tokens pad"]:
    """See the contract."""
    del interpret
    pad, channels = a_packed.shape
    x, scale, parts = x[:, :channels], kept_scale(masks.rate), []
    for place, keep in keeps(masks, x.shape[0], channels):
        parts.append(dot_float32(jnp.where(keep, x, jnp.zeros((), x.dtype)), a_packed[place], (1, 1)) * scale)
    return jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (0, pad - masks.rank))).astype(x.dtype)


def input_gradient(
    dx: Float[Array, "tokens in"],
    g: Float[Array, "tokens pad"],
    a_packed: Float[Array, "pad in"],
    masks: Masks,
    *,
    interpret: bool = False,
) -> Float[Array, "tokens in"]:
    """See the contract."""
    del interpret
    total, scale = dx.astype(jnp.float32), kept_scale(masks.rate)
    for place, keep in keeps(masks, *dx.shape):
        total = total + jnp.where(keep, dot_float32(g[:, place], a_packed[place], (1, 0)), 0.0) * scale
    return total.astype(dx.dtype)


def gradient_a(
    g: Float[Array, "tokens pad"], x: Float[Array, "tokens wide"], masks: Masks, channels: int, *, interpret: bool = False
) -> Float32[Array, "rank in"]:
    """See the contract. channels: `in`."""
    del interpret
    x, scale, parts = x[:, :channels], kept_scale(masks.rate), []
    for place, keep in keeps(masks, x.shape[0], channels):
        parts.append(dot_float32(g[:, place], jnp.where(keep, x, jnp.zeros((), x.dtype)), (0, 0)) * scale)
    return jnp.concatenate(parts)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def differentiable(x: Any, a: Any, masks: Masks, products: Any, interpret: bool) -> Any:
    """`lora_dropout` by a module's products."""
    return products.project(x, a.astype(x.dtype), masks, interpret=interpret)


def _forward(x: Any, a: Any, masks: Masks, products: Any, interpret: bool) -> tuple[Any, Any]:
    return differentiable(x, a, masks, products, interpret), (x, a, masks)


def _backward(products: Any, interpret: bool, kept: Any, g: Any) -> tuple[Any, Any, None]:
    x, a, masks = kept
    dx = products.input_gradient(jnp.zeros_like(x), g, a.astype(x.dtype), masks, interpret=interpret)
    return dx, products.gradient_a(g, x, masks, x.shape[1], interpret=interpret), None


differentiable.defvjp(_forward, _backward)


def lora_dropout(x: Float[Array, "tokens in"], a: Float32[Array, "rank in"], masks: Masks) -> Float[Array, "tokens rank"]:
    """See the contract."""
    return differentiable(x, a, masks, _Plain, False)


class _Plain:
    project, input_gradient, gradient_a = staticmethod(project), staticmethod(input_gradient), staticmethod(gradient_a)
