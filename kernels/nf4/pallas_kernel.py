"""NF4 dequantization as one Pallas kernel (lowered through Triton): codes and both levels of scales in, the weight out.

One program writes `TILE` blocks of 64 values, as the Triton kernel does. A stacked weight is read in place: the layer's index
moves the program's first row of codes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4, Nested
from jaxsloth.kernels.nf4.xla_ops import select_layer

TILE = 64
_BYTES = BLOCK // 2
_INT32 = 2**31


def _look_up(index: Any) -> Any:
    """CODE[index] by fifteen selections on the bits of the index: no table in memory, and it lowers everywhere."""
    values = [jnp.float32(value) for value in CODE]
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _kernel(
    layer: Any, codes: Any, absmax: Any, *rest: Any, blocks: int, outer_blocks: int, across: int = 1, first_row: int = 0
) -> None:
    """across: blocks in a row of the output, which is then a matrix; its first row is `first_row`."""
    *nested, out = rest
    tile = jnp.arange(TILE, dtype=jnp.int32) + pl.program_id(0) * TILE
    inside = tile < blocks
    row = jnp.where(inside, tile, 0) + layer[0] * blocks
    scale = absmax[row]
    if nested:
        outer, offset, book = nested
        block = jnp.where(inside, tile, 0)
        product = book[scale.astype(jnp.int32)] * outer[block // NESTED_BLOCK + layer[0] * outer_blocks]
        # bitsandbytes rounds the product before it adds; a clip that changes nothing keeps the two from being fused.
        scale = jnp.clip(product, -3e38, 3e38) + offset[jnp.zeros(TILE, jnp.int32) + layer[0]]
    byte = codes[row[:, None], jnp.arange(_BYTES, dtype=jnp.int32)[None, :]].astype(jnp.int32)
    pair = jnp.stack([_look_up(byte >> 4), _look_up(byte & 15)], axis=-1).reshape(TILE, BLOCK)
    value = (pair * scale[:, None]).astype(out.dtype)
    place, column = tile // across + first_row, (tile % across * BLOCK)[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
    plgpu.store(out.at[place[:, None], column], value, mask=inside[:, None])


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def dequantize(
    quantized: NF4, dtype: Any, *, layer: Int[Array, ""] | None = None, interpret: bool = False
) -> Float[Array, "out in"]:
    """The weight ``[out, in]`` of a quantized one, rounded once from float32 to `dtype`; bit-equal with xla_ops."""
    out, in_ = quantized.shape
    arguments, blocks, outer_blocks = _arguments(quantized, layer)
    call = pl.pallas_call(
        partial(_kernel, blocks=blocks, outer_blocks=outer_blocks),
        out_shape=jax.ShapeDtypeStruct((blocks, BLOCK), dtype),
        grid=(pl.cdiv(blocks, TILE),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="nf4_dequantize",
    )
    return call(*arguments).reshape(-1)[: out * in_].reshape(out, in_)


def dequantize_rows(
    quantized: NF4,
    dtype: Any,
    shape: tuple[int, int],
    first_row: int,
    *,
    into: Array | None = None,
    layer: Int[Array, ""] | None = None,
    interpret: bool = False,
) -> Array:
    """A matrix of `shape` whose rows from `first_row` on begin with the weight; the rest is that of `into`, in place, or
    whatever the memory held.

    Raises:
        ValueError: the weight's rows are not a multiple of 64 values long.
    """
    if quantized.shape[1] % BLOCK:
        raise ValueError(f"rows must be a multiple of {BLOCK} values long, and these have {quantized.shape[1]}")
    arguments, blocks, outer_blocks = _arguments(quantized, layer)
    kernel = partial(_kernel, blocks=blocks, outer_blocks=outer_blocks, across=quantized.shape[1] // BLOCK, first_row=first_row)

    def beside(*references: Any) -> None:
        """Leaves out the reference to what was there before: it is the output."""
        kernel(*references[:-2], references[-1])

    call = pl.pallas_call(
        kernel if into is None else beside,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(pl.cdiv(blocks, TILE),),
        input_output_aliases={} if into is None else {len(arguments): 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="nf4_dequantize_rows",
    )
    return call(*arguments, *(() if into is None else (into,)))


def _arguments(quantized: NF4, layer: Array | None) -> tuple[list[Any], int, int]:
    """(the kernel's inputs, blocks a layer, outer blocks a layer)."""
    stacked = quantized
    if layer is not None and quantized.codes.size >= _INT32:
        # Offsets are int32 in the kernel: a stack beyond that is sliced first.
        quantized, layer = select_layer(quantized, layer), None
    if layer is None:
        stacked = NF4(quantized.codes[None], quantized.absmax[None], _one(quantized.nested), quantized.shape)
        layer = jnp.zeros((), jnp.int32)
    layers, blocks = stacked.absmax.shape
    codes = jnp.pad(stacked.codes, ((0, 0), (0, blocks * _BYTES - stacked.codes.shape[1]))).reshape(layers * blocks, _BYTES)
    arguments = [jnp.reshape(layer, 1).astype(jnp.int32), codes, stacked.absmax.reshape(-1)]
    outer_blocks = 0
    if stacked.nested is not None:
        outer_blocks = stacked.nested.absmax.shape[1]
        arguments += [stacked.nested.absmax.reshape(-1), stacked.nested.offset.reshape(-1), stacked.nested.code]
    return arguments, blocks, outer_blocks


def _one(nested: Nested | None) -> Nested | None:
    """A single weight's second level as a stack of one."""
    if nested is None:
        return None
    return Nested(nested.absmax[None], jnp.reshape(nested.offset, (1,)), nested.code)
