"""NF4 in plain JAX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from jaxsloth.kernels.jax_platform import precision_of
from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4, Nested, dynamic_code, step_lookup

jax.tree_util.register_dataclass(Nested, data_fields=["absmax", "offset", "code"], meta_fields=[])
jax.tree_util.register_dataclass(NF4, data_fields=["codes", "absmax", "nested"], meta_fields=["shape"])

SMALLEST_ABSMAX = np.float32(1e-38)
_PADDING_INDEX = 7  # the code of zero: what bitsandbytes puts in the low nibble after an odd number of values


def quantize(weight: Float[Array, "out in"], *, nested: bool = False, offset: Float32[Array, ""] | None = None) -> NF4:
    """Quantize a weight ``[out, in]`` of any float dtype, on its device; see the contract for the format.

    Reciprocals of the maxima are taken on the host, so this can't be traced: weights are quantized as they are loaded.

    Args:
        offset: replaces the mean of the maxima in a nested quantization.

    Raises:
        ValueError: the weight is empty, or an offset is given without nested.
    """
    if weight.size == 0:
        raise ValueError(f"a weight to quantize must hold values, and this one has the shape {weight.shape}")
    if offset is not None and not nested:
        raise ValueError("offset belongs to nested quantization: pass nested=True with it, or leave it out")
    shape = (weight.shape[0], weight.shape[1])
    absmax = _block_maxima(weight, BLOCK)
    tail = None
    if weight.size % BLOCK:
        # bitsandbytes multiplies whole blocks by a rounded reciprocal, divides a last, partial one, and keeps its scale from 0.
        last = np.maximum(np.asarray(absmax[-1]), SMALLEST_ABSMAX)
        tail = jnp.asarray(np.asarray(weight.reshape(-1)[-(weight.size % BLOCK) :], np.float32) / last)
        absmax = absmax.at[-1].set(last)
    codes = _codes(weight, _reciprocals(np.maximum(np.asarray(absmax), SMALLEST_ABSMAX)), tail)
    if not nested:
        return NF4(codes, absmax, None, shape)
    centred, outer, offset = _centre(absmax, offset)
    absmax_codes = _nested_codes(centred, outer, _reciprocals(np.asarray(outer)))
    return NF4(codes, absmax_codes, Nested(outer, offset, jax.device_put(dynamic_code())), shape)


def _reciprocals(values: np.ndarray) -> Array:
    """1 / values, 0 for 0, correctly rounded: XLA's division on a GPU is not, and it reads denormals as 0."""
    with np.errstate(divide="ignore"):
        return jax.device_put(np.where(values > 0, np.float32(1.0) / values, np.float32(0.0)).astype(np.float32))


@partial(jax.jit, static_argnames=("size",))
def _block_maxima(values: Array, size: int) -> Array:
    """The largest magnitude of every `size` values, float32."""
    flat = values.reshape(-1).astype(jnp.float32)
    return jnp.max(jnp.abs(jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)), axis=1)


@jax.jit
def _centre(absmax: Array, offset: Array | None) -> tuple[Array, Array, Array]:
    """(the maxima less an offset, their mean where none is given; the largest magnitude of every 256 of them; the offset)."""
    offset = jnp.mean(absmax) if offset is None else offset
    centred = absmax - offset
    return centred, _block_maxima(centred, NESTED_BLOCK), offset


@jax.jit
def _codes(values: Array, reciprocals: Array, tail: Array | None) -> Array:
    """uint8 ``[bytes]`` from the values, the reciprocal of every block's maximum, and a partial block already scaled."""
    flat = values.reshape(-1)
    padded = jnp.pad(flat.astype(jnp.float32), (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    scaled = (padded * reciprocals[:, None]).reshape(-1)[: flat.size + flat.size % 2]
    if tail is not None:
        scaled = jax.lax.dynamic_update_slice_in_dim(scaled, tail, flat.size - tail.size, axis=0)
    # The number of midpoints below a value; fifteen comparisons fuse, a binary search does not.
    midpoints = (CODE[:-1] + CODE[1:]) / np.float32(2)
    indices = jnp.zeros(scaled.shape, jnp.uint8)
    for midpoint in midpoints:
        indices += (scaled > midpoint).astype(jnp.uint8)
    if flat.size % 2:
        indices = indices.at[-1].set(_PADDING_INDEX)
    return (indices[::2] << 4) | indices[1::2]


@jax.jit
def _nested_codes(centred: Array, outer: Array, reciprocals: Array) -> Array:
    """The 8-bit codes of the maxima less their offset; outer holds the maximum of every 256."""
    padded = jnp.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    return dynamic_codes(padded, outer, reciprocals).reshape(-1)[: centred.size]


def dynamic_codes(
    values: Float32[Array, "blocks 256"], absmax: Float32[Array, " blocks"], reciprocals: Array, signed: bool = True
) -> UInt8[Array, "blocks 256"]:
    """Values in 8 bits of the dynamic code, given their blocks' absolute maxima and the reciprocals of those."""
    scaled = jnp.clip(values * reciprocals[:, None], -1.0, 1.0)
    # Each operation is rounded by itself, as bitsandbytes' are: the clip keeps XLA from contracting product and sum.
    steps = jnp.clip((scaled + 1.0) * 0.5 * 65535.0, 0.0, 65535.0) + 0.5
    codes = jnp.asarray(step_lookup(signed=signed))[steps.astype(jnp.int32)]
    return jnp.where(absmax[:, None] == 0, jnp.uint8(0), codes)


def select_layer(quantized: NF4, layer: Int[Array, ""]) -> NF4:
    """One layer of a stacked weight; the slices fuse into what reads them."""

    def pick(array: Any) -> Any:
        return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)

    nested = quantized.nested
    if nested is not None:
        nested = Nested(pick(nested.absmax), pick(nested.offset), nested.code)
    return NF4(pick(quantized.codes), pick(quantized.absmax), nested, quantized.shape)


def block_scales(quantized: NF4) -> Float32[Array, " blocks"]:
    """The float32 absmax of every block, with the nested level undone."""
    if quantized.nested is None:
        return quantized.absmax
    nested = quantized.nested
    outer = jnp.repeat(nested.absmax, NESTED_BLOCK)[: quantized.absmax.shape[-1]]
    product = nested.code[quantized.absmax.astype(jnp.int32)] * outer
    # bitsandbytes rounds the product before it adds; the clip, which changes nothing, keeps XLA from fusing the two.
    return jnp.clip(product, -3e38, 3e38) + nested.offset


@partial(jax.jit, static_argnames=("dtype",))
def dequantize(quantized: NF4, dtype: Any, *, layer: Int[Array, ""] | None = None) -> Float[Array, "out in"]:
    """The weight ``[out, in]`` of a quantized one, rounded once from float32 to `dtype`."""
    if layer is not None:
        quantized = select_layer(quantized, layer)
    out, in_ = quantized.shape
    values = unpack(quantized.codes)
    blocks = jnp.pad(values, (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    weight = (blocks * block_scales(quantized)[:, None]).reshape(-1)[: out * in_]
    return weight.astype(dtype).reshape(out, in_)


def unpack(codes: UInt8[Array, " bytes"]) -> Float32[Array, " values"]:
    """The code book's values of every nibble, the high one first."""
    book = jnp.asarray(CODE)
    indices = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    return book[indices.astype(jnp.int32)]


def matvec(
    x: Float[Array, "rows in"], weights: Sequence[NF4], *, layer: Int[Array, ""] | None = None
) -> Float[Array, "rows out"]:
    """``[x·W0ᵀ, x·W1ᵀ, …]`` accumulated in float32; the weights are dequantized for the product."""
    dense = [dequantize(weight, x.dtype, layer=layer) for weight in weights]
    weight = dense[0] if len(dense) == 1 else jnp.concatenate(dense)
    dimensions = (((1,), (1,)), ((), ()))
    out = jax.lax.dot_general(x, weight, dimensions, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    return out.astype(x.dtype)
