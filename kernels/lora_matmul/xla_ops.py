"""The adapted linear layer in plain JAX, with a backward that rebuilds what the forward threw away."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxsloth.kernels.dropout.contract import kept_scale
from jaxsloth.kernels.dropout.xla_ops import keep_mask
from jaxsloth.kernels.jax_platform import precision_of, target_of
from jaxsloth.kernels.lora_matmul.contract import Dropout
from jaxsloth.kernels.nf4.contract import DEQUANTIZE
from jaxsloth.kernels.nf4.xla_ops import NF4  # from here, since this module makes it a pytree
from jaxsloth.kernels.registry import resolve

jax.tree_util.register_dataclass(Dropout, data_fields=["key", "rows"], meta_fields=["rate"])


def _dense(base: Any, layer: Any, dtype: Any) -> Array:
    """The base ``[out, in]`` in the compute dtype, for one use."""
    if isinstance(base, NF4):
        return resolve(DEQUANTIZE, "jax", target_of(dtype))(base, dtype, layer=layer)
    if layer is not None:
        base = jax.lax.dynamic_index_in_dim(base, layer, keepdims=False)
    return base.astype(dtype)


def _product(a: Array, b: Array, contract: tuple[int, int], dtype: Any) -> Array:
    """The product over axis contract[0] of a and contract[1] of b, accumulated in float32, returned in dtype."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    out = jax.lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)
    return out.astype(dtype)


def _drop(x: Array, dropout: Dropout | None, shape: tuple[int, ...]) -> Array:
    """`x`, flat ``[tokens, in]``, with the mask of ``[batch, length, in]`` applied and the rest scaled up."""
    if dropout is None:
        return x
    _, length, channels = shape
    keep = keep_mask(dropout.key, dropout.rows, length, channels, rate=dropout.rate)
    kept = (x * kept_scale(dropout.rate)).astype(x.dtype)
    return jnp.where(keep.reshape(-1, channels), kept, jnp.zeros((), x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _lora_matmul(x: Any, base: Any, a: Any, b: Any, bias: Any, dropout: Any, layer: Any, scale: float) -> Array:
    flat = x.reshape(-1, x.shape[-1])
    # The sum is formed in float32 and rounded once.
    y = _product(flat, _dense(base, layer, x.dtype), (1, 1), jnp.float32)
    if a is not None:
        low = _product(_drop(flat, dropout, x.shape), a.astype(x.dtype), (1, 1), x.dtype)
        y = y + _product(low, (scale * b).astype(x.dtype), (1, 1), jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _forward(x: Any, base: Any, a: Any, b: Any, bias: Any, dropout: Any, layer: Any, scale: float) -> tuple[Array, Any]:
    y = _lora_matmul(x, base, a, b, bias, dropout, layer, scale)
    # Without an adapter nothing of x is needed again but its shape.
    kept = x if a is not None else jnp.zeros((0, *x.shape), x.dtype)
    return y, (kept, base, a, b, bias, dropout, layer)


def _backward(scale: float, kept: Any, dy: Array) -> tuple[Any, ...]:
    x, base, a, b, bias, dropout, layer = kept
    shape = x.shape if a is not None else x.shape[1:]
    flat_dy = dy.reshape(-1, dy.shape[-1])
    dx = _product(flat_dy, _dense(base, layer, dy.dtype), (1, 0), jnp.float32)
    da = db = None
    if a is not None:
        flat, low_a = x.reshape(-1, x.shape[-1]), a.astype(x.dtype)
        g = _product(flat_dy, (scale * b).astype(x.dtype), (1, 0), x.dtype)
        dropped = _drop(flat, dropout, shape)
        da = _product(g, dropped, (0, 0), jnp.float32)
        db = scale * _product(flat_dy, _product(dropped, low_a, (1, 1), x.dtype), (0, 0), jnp.float32)
        dx = dx + _drop(_product(g, low_a, (1, 0), jnp.float32), dropout, shape)
    dbias = None if bias is None else flat_dy.astype(jnp.float32).sum(axis=0).astype(bias.dtype)
    return dx.astype(dy.dtype).reshape(shape), None, da, db, dbias, None, None


_lora_matmul.defvjp(_forward, _backward)


def lora_matmul(
    x: Float[Array, "*lead in"],
    base: Any,
    lora_a: Float32[Array, "r in"] | None = None,
    lora_b: Float32[Array, "out r"] | None = None,
    *,
    scale: float = 1.0,
    bias: Float[Array, " out"] | None = None,
    dropout: Dropout | None = None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*lead out"]:
    """A frozen linear layer and its adapter; formulas, dtypes and gradients are the contract's.

    Args:
        base: ``[out, in]`` or an NF4; with `layer`, stacked ``[layers, out, in]`` or an NF4 of stacked arrays.

    Raises:
        ValueError: one of lora_a and lora_b without the other, or dropout on an x that is not ``[batch, length, in]``.
    """
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b belong together: pass both or neither")
    if dropout is not None and x.ndim != 3:
        raise ValueError(
            f"dropout draws its mask by row, position and channel, so x must be [batch, length, in]; got {x.shape}"
        )
    if dropout is not None and dropout.rate == 0.0:
        dropout = None
    return _lora_matmul(x, base, lora_a, lora_b, bias, dropout, layer, scale)
