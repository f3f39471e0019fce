"""NF4 in plain JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4, Nested, dynamic_code, nested_lookup

jax.tree_util.register_dataclass(Nested, data_fields=["absmax", "offset", "code"], meta_fields=[])
jax.tree_util.register_dataclass(NF4, data_fields=["codes", "absmax", "nested"], meta_fields=["shape"])

SMALLEST_ABSMAX = 1e-38  # what bitsandbytes stores for a partial block of zeros
SMALLEST_NORMAL = 2.0**-126
_PADDING_INDEX = 7  # the code of zero: what bitsandbytes puts in the low nibble after an odd number of values


def quantize(weight: Float[Array, "out in"], *, nested: bool = False, offset: Float32[Array, ""] | None = None) -> NF4:
    """Quantize a weight ``[out, in]`` of any float dtype, on its device; see the contract for the format.

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
    codes, absmax = _quantize_blocks(weight)
    if not nested:
        return NF4(codes, absmax, None, shape)
    offset = jnp.mean(absmax) if offset is None else offset
    absmax_codes, outer = _quantize_absmax(absmax, offset)
    return NF4(codes, absmax_codes, Nested(outer, offset, jnp.asarray(dynamic_code())), shape)


@jax.jit
def _quantize_blocks(weight: Array) -> tuple[Array, Array]:
    flat = weight.reshape(-1).astype(jnp.float32)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    # bitsandbytes multiplies whole blocks by a rounded reciprocal, and divides a last, partial one. The barrier keeps XLA from
    # turning the one into the other. Selections take the place of maxima with 1e-38, a denormal, which XLA reads as zero.
    scale = jnp.where(absmax < SMALLEST_NORMAL, SMALLEST_NORMAL, absmax)
    scaled = blocks * jax.lax.optimization_barrier(1.0 / scale)[:, None]
    if flat.size % BLOCK:
        scaled = scaled.at[-1].set(blocks[-1] / jax.lax.optimization_barrier(jnp.full(BLOCK, scale[-1])))
        absmax = absmax.at[-1].set(jnp.where(absmax[-1] < SMALLEST_NORMAL, SMALLEST_ABSMAX, absmax[-1]))
    midpoints = (CODE[:-1] + CODE[1:]) / np.float32(2)
    # The number of midpoints below a value; fifteen comparisons fuse, a binary search does not.
    indices = sum((scaled > midpoint).astype(jnp.uint8) for midpoint in midpoints)
    indices = jnp.asarray(indices).reshape(-1)[: flat.size + flat.size % 2]
    if flat.size % 2:
        indices = indices.at[-1].set(_PADDING_INDEX)
    return (indices[::2] << 4) | indices[1::2], absmax


@jax.jit
def _quantize_absmax(absmax: Array, offset: Array) -> tuple[Array, Array]:
    """The maxima less their offset, in 8 bits, and their own maxima by blocks of 256."""
    centred = absmax - offset
    padded = jnp.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    outer = jnp.max(jnp.abs(padded), axis=1)
    reciprocal = jnp.where(outer > 0, 1.0 / jnp.where(outer > 0, outer, 1.0), 0.0)
    scaled = jnp.clip(padded * reciprocal[:, None], -1.0, 1.0)
    # Each operation is rounded by itself, as bitsandbytes' are: the clips keep XLA from contracting product and sum.
    steps = jnp.clip((scaled + 1.0) * 0.5 * 65535.0, 0.0, 65535.0) + 0.5
    codes = jnp.asarray(nested_lookup())[steps.astype(jnp.int32)]
    codes = jnp.where(outer[:, None] == 0, jnp.uint8(0), codes)
    return codes.reshape(-1)[: centred.size], outer


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
