"""An NF4 weight times few rows as one Pallas kernel (lowered through Triton): codes are decoded in registers and met by x.

A program owns `TILE_OUT` rows of the weight and goes through them some blocks of 64 values at a time. The two nibbles of a byte
meet the even and the odd values of x, so nothing is interleaved. One row of x is multiplied in float32 lanes; more go through
the tensor cores, each weight rounded to x's dtype first. A stacked weight is read in place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxsloth.kernels.jax_platform import dot_float32
from jaxsloth.kernels.nf4.contract import BLOCK, MATVEC_ROWS, NESTED_BLOCK, NF4
from jaxsloth.kernels.nf4.pallas_kernel import _arguments

_BYTES = BLOCK // 2


def _kernel(
    layer: Any,
    table: Any,
    codes: Any,
    absmax: Any,
    *rest: Any,
    out: int,
    across: int,
    outer_blocks: int,
    tile_out: int,
    tile_blocks: int,
    rows: int,
) -> None:
    """across: blocks in a row of the weight, a multiple of tile_blocks. x ``[rows, in]``, y ``[rows, out]``."""
    *nested, x, y = rest
    row = jnp.arange(tile_out, dtype=jnp.int32) + pl.program_id(0) * tile_out
    inside = row < out
    own = jnp.where(inside, row, 0) * across
    byte_of = jnp.arange(tile_blocks * _BYTES, dtype=jnp.int32)

    def scales(first: Any) -> Any:
        block = own[:, None] + (first + jnp.arange(tile_blocks, dtype=jnp.int32))[None, :]
        scale = absmax[block + layer[0] * (out * across)]
        if nested:
            outer, offset, book = nested
            product = book[scale.astype(jnp.int32)] * outer[block // NESTED_BLOCK + layer[0] * outer_blocks]
            scale = product + offset[jnp.zeros_like(block) + layer[0]]
        wide = jnp.broadcast_to(scale[:, :, None], (tile_out, tile_blocks, _BYTES))
        return wide.reshape(tile_out, tile_blocks * _BYTES)

    def add(step: Any, total: Any) -> Any:
        first = step * tile_blocks
        block = own[:, None] + layer[0] * (out * across) + first + (byte_of // _BYTES)[None, :]
        byte = codes[block, jnp.broadcast_to((byte_of % _BYTES)[None, :], block.shape)].astype(jnp.int32)
        scale = scales(first)
        high, low = table[byte >> 4] * scale, table[byte & 15] * scale
        channel = first * BLOCK + 2 * byte_of
        if rows == 1:
            zero = jnp.zeros_like(channel)
            even, odd = x[zero, channel].astype(jnp.float32), x[zero, channel + 1].astype(jnp.float32)
            return total + high * even[None, :] + low * odd[None, :]
        which = jnp.arange(rows, dtype=jnp.int32)[:, None]
        even, odd = x[which, channel[None, :]], x[which, channel[None, :] + 1]
        total += dot_float32(high.astype(x.dtype), even, (1, 1))
        return total + dot_float32(low.astype(x.dtype), odd, (1, 1))

    shape = (tile_out, tile_blocks * _BYTES if rows == 1 else rows)
    total = jax.lax.fori_loop(0, across // tile_blocks, add, jnp.zeros(shape, jnp.float32))
    if rows == 1:
        result = jnp.sum(total, axis=1).astype(y.dtype)
        plgpu.store(y.at[jnp.zeros_like(row), row], result, mask=inside)
    else:
        which = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None, :], shape)
        place = jnp.broadcast_to(row[:, None], shape)
        plgpu.store(y.at[which, place], total.astype(y.dtype), mask=jnp.broadcast_to(inside[:, None], shape))


@partial(jax.jit, static_argnames=("interpret",))
def matvec(
    x: Float[Array, "rows in"], quantized: NF4, *, layer: Int[Array, ""] | None = None, interpret: bool = False
) -> Float[Array, "rows out"]:
    """As xla_ops' function of this name, for at most `MATVEC_ROWS` rows of whole blocks.

    Raises:
        ValueError: more rows, or rows that are not whole blocks.
    """
    rows, in_ = x.shape
    out = quantized.shape[0]
    if rows > MATVEC_ROWS or in_ % BLOCK:
        raise ValueError(f"matvec takes at most {MATVEC_ROWS} rows of whole blocks of {BLOCK} values, and {x.shape} came")
    arguments, _, outer_blocks = _arguments(quantized, layer)
    padded, across = 1 if rows == 1 else MATVEC_ROWS, in_ // BLOCK
    tile_out, most = (8, 16) if rows == 1 else (32, 2)
    tile_blocks = next(size for size in (16, 8, 4, 2, 1) if size <= most and across % size == 0)
    call = pl.pallas_call(
        partial(
            _kernel,
            out=out,
            across=across,
            outer_blocks=outer_blocks,
            tile_out=tile_out,
            tile_blocks=tile_blocks,
            rows=padded,
        ),
        out_shape=jax.ShapeDtypeStruct((padded, out), x.dtype),
        grid=(pl.cdiv(out, tile_out),),
        compiler_params=plgpu.CompilerParams(num_warps=4 if rows == 1 else 2, num_stages=1),
        interpret=interpret,
        name="nf4_matvec",
    )
    return call(*arguments, jnp.pad(x, ((0, padded - rows), (0, 0))))[:rows]
