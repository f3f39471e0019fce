"""Adapted linear layers that share their input as one product each way, on arrays with pad columns behind their rows.

With the layers' weights stacked to ``W [out, in]``, their A to ``[rank, in]`` and their scaled B laid out block by block in
``[out, rank]``:

    y = [x, x·Aᵀ] · [W, sB]ᵀ        dx = [dy, dy·sB] · [W; A]

x and dy are padded: ``[tokens, width + pad]`` with columns past `width` that hold nothing, so that ``x·Aᵀ`` and ``dy·sB`` are
written behind the rows in place by a kernel (`append_product`), and no product's operand is cut, padded or copied. The adapter
costs a few more columns of the product instead of reading and writing y once more. y and dx have none: 64
columns more would cost their products even tiles. The kernels form `PAD` columns a program, so that a wider pad takes more
programs, not more shared memory.

Behind a dropout (`Masks`) the layers' products with A have inputs of their own (kernels/lora_dropout): ``x·Aᵀ`` is projected
through the masks, dx is ``dy·W`` alone with the rest added by a kernel, and so is dA.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsloth.kernels.jax_platform import dot_float32, precision_of
from jaxsloth.kernels.lora_dropout import pallas_kernel as dropout_kernels
from jaxsloth.kernels.lora_dropout import xla_ops as dropout_ops
from jaxsloth.kernels.lora_dropout.contract import Masks
from jaxsloth.kernels.lora_matmul.contract import PAD
from jaxsloth.kernels.nf4.pallas_kernel import dequantize_rows
from jaxsloth.kernels.nf4.xla_ops import NF4  # from here, since this module makes it a pytree

# The most columns that layers with one input may ask for: r=256 on each of q, k and v. The columns are theirs block by block,
# so that two thirds of those 768 are zeros that a product multiplies: beyond, the composed ops do less.
MOST = 768
# Tuned on an H200 (benchmarks, docs/performance.md).
DEPTH = 128  # columns of x that a step of the products takes
WIDTH, HEIGHT = 64, 32  # columns of x whose gradients a program forms, rows that a step of the sum takes
FEW_ROWS = 4096
PRODUCT_PROGRAMS, GRADIENT_PROGRAMS = 256, 528  # that a kernel should at least have


@dataclass(frozen=True)
class GroupLayout:
    """What is fixed about layers that share their input: outs and ranks one by one (rank 0: no adapter), scales likewise.

    pad: the columns behind the rows of x and dy, a multiple of `PAD` that is no less than the ranks' sum.
    """

    in_features: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    pad: int
    interpret: bool = False

    @property
    def out_features(self) -> int:
        return sum(self.outs)

    @property
    def rank(self) -> int:
        return sum(self.ranks)


def refuses(in_features: int, rank: int) -> str | None:
    """rank: the sum of those of the layers."""
    if rank > MOST:
        return f"has room for ranks of {MOST} in all, and layers that share an input have {rank}"
    return None if in_features % 64 == 0 else f"needs inputs that are a multiple of 64 wide, and one has {in_features}"


def _tile(ref: Any, rows: Any, columns: Any, row_end: int, column_end: int) -> Any:
    """``ref[rows, columns]``, zero outside of the first row_end rows and column_end columns."""
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return plgpu.load(ref.at[jnp.where(rows < row_end, rows, 0)[:, None], columns[None, :]], mask=inside, other=0.0)


def _share(pad: int) -> Any:
    """Which rows or columns of x are this program's: neighbours have the same ones, and share what they read."""
    return pl.program_id(0) if pad == PAD else pl.program_id(0) // (pad // PAD)


def _columns(pad: int) -> Any:
    """The `PAD` pad columns that are this program's."""
    own = jnp.arange(PAD, dtype=jnp.int32)
    return own if pad == PAD else pl.program_id(0) % (pad // PAD) * PAD + own


def _append_kernel(x: Any, matrix: Any, out: Any, *, rows: int, width: int, height: int, steps: int, splits: int) -> None:
    """One program: `height` rows times a part of the columns. Without splits the products go behind the rows of x."""
    pad = matrix.shape[0]
    row = _share(pad) * height + jnp.arange(height, dtype=jnp.int32)
    low = _columns(pad)
    first = pl.program_id(1) * steps

    def add(step: Any, total: Any) -> Any:
        column = (first + step) * DEPTH + jnp.arange(DEPTH, dtype=jnp.int32)
        return total + dot_float32(_tile(x, row, column, rows, width), _tile(matrix, low, column, pad, width), (1, 1))

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((height, PAD), jnp.float32))
    inside = jnp.broadcast_to((row < rows)[:, None], (height, PAD))
    if splits == 1:
        plgpu.store(out.at[row[:, None], width + low[None, :]], total.astype(out.dtype), mask=inside)
    else:
        plgpu.store(out.at[pl.program_id(1), row[:, None], low[None, :]], total, mask=inside)


def append_product(x: Any, matrix: Any, *, interpret: bool = False) -> Any:
    """x ``[tokens, width + pad]`` with ``x[:, :width]·matrixᵀ`` in its last columns, in place where x is not used again.

    matrix ``[pad, width]`` in x's dtype; pad a multiple of `PAD`.
    """
    pad, width = matrix.shape
    rows, tiles = x.shape[0], pad // PAD
    height = 16 if rows <= FEW_ROWS else 64
    steps = pl.cdiv(width, DEPTH)
    # Where the rows make few programs the columns are shared out too, and the parts summed behind.
    splits = min(steps, pl.cdiv(PRODUCT_PROGRAMS, pl.cdiv(rows, height) * tiles))
    steps = pl.cdiv(steps, splits)
    call = pl.pallas_call(
        partial(_append_kernel, rows=rows, width=width, height=height, steps=steps, splits=splits),
        out_shape=jax.ShapeDtypeStruct(*((x.shape, x.dtype) if splits == 1 else ((splits, rows, pad), jnp.float32))),
        grid=(pl.cdiv(rows, height) * tiles, splits),
        input_output_aliases={0: 0} if splits == 1 else {},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="lora_append",
    )
    product = call(x, matrix)
    return product if splits == 1 else jax.lax.dynamic_update_slice(x, product.sum(axis=0).astype(x.dtype), (0, width))


def _gradient_kernel(x: Any, low: Any, out: Any, *, rows: int, first: int, steps: int) -> None:
    """One program: `WIDTH` columns of x, a part of the rows."""
    columns = _share(low.shape[1] - first) * WIDTH + jnp.arange(WIDTH, dtype=jnp.int32)
    pad = _columns(low.shape[1] - first)
    start = pl.program_id(1) * steps

    def add(step: Any, total: Any) -> Any:
        row = (start + step) * HEIGHT + jnp.arange(HEIGHT, dtype=jnp.int32)
        own = _tile(low, row, first + pad, rows, low.shape[1])
        return total + dot_float32(_tile(x, row, columns, rows, x.shape[1]), own, (0, 0))

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((WIDTH, PAD), jnp.float32))
    inside = jnp.broadcast_to((columns < x.shape[1])[:, None], (WIDTH, PAD))
    plgpu.store(out.at[pl.program_id(1), columns[:, None], pad[None, :]], total, mask=inside)


def low_rank_gradient(x: Any, low: Any, pad: int, *, interpret: bool = False) -> Any:
    """``xᵀ·low[:, -pad:]``, float32 ``[columns of x, pad]``; x and low ``[tokens, …]`` of one dtype, pad a multiple of
    `PAD`."""
    rows, tiles = x.shape[0], pad // PAD
    across, steps = pl.cdiv(x.shape[1], WIDTH), pl.cdiv(rows, HEIGHT)
    splits = min(steps, pl.cdiv(GRADIENT_PROGRAMS, across * tiles))
    steps = pl.cdiv(steps, splits)
    call = pl.pallas_call(
        partial(_gradient_kernel, rows=rows, first=low.shape[1] - pad, steps=steps),
        out_shape=jax.ShapeDtypeStruct((splits, x.shape[1], pad), jnp.float32),
        grid=(across * tiles, splits),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="lora_gradient",
    )
    parts = call(x, low)
    return parts[0] if splits == 1 else parts.sum(axis=0)


@dataclass(frozen=True)
class PackedAdapters:
    """What a group's adapters put around its weights: a_packed ``[pad, in]``, the layers' A one below the other, then zeros;
    b_packed ``[out, pad]``, their scaled B block by block, zeros around. In the compute dtype."""

    a_packed: Any
    b_packed: Any


def pack_adapters(group: GroupLayout, adapters: Any, dtype: Any) -> PackedAdapters:
    """adapters: (A float32 ``[r, in]``, B float32 ``[out, r]``) or None, each layer's."""
    rows = [a.astype(dtype) for a, _ in (pair for pair in adapters if pair is not None)]
    rows.append(jnp.zeros((group.pad - group.rank, group.in_features), dtype))
    blocks, start = [], 0
    for out, rank, scale, pair in zip(group.outs, group.ranks, group.scales, adapters, strict=True):
        own = jnp.zeros((out, 0), dtype) if pair is None else (scale * pair[1]).astype(dtype)
        blocks.append(jnp.pad(own, ((0, 0), (start, group.pad - start - rank))))
        start += rank
    return PackedAdapters(jnp.concatenate(rows), jnp.concatenate(blocks))


def forward(
    group: GroupLayout,
    x: Any,
    bases: Any,
    packed: PackedAdapters,
    bias: Any = None,
    layer: Any = None,
    xa: Any = None,
    masks: Masks | None = None,
) -> tuple[Any, Any, Any]:
    """(y ``[tokens, out]``; ``x·Aᵀ [tokens, pad]``, None where there is no pad; x with that behind its rows) from x
    ``[tokens, in + pad]``, padded.

    bases: dense ``[out, in]`` or NF4 each, stacked where `layer` is given. bias: ``[out]`` or None. xa: ``x·Aᵀ`` where it is
    known. masks: of the adapted layers' dropout, here and below.
    """
    if masks is not None and xa is None:
        xa = _dropout(group).project(x, packed.a_packed, masks)
    if group.pad and xa is None:
        x = append_product(x, packed.a_packed, interpret=group.interpret)
        xa = x[:, group.in_features :]
    elif group.pad:
        x = jax.lax.dynamic_update_slice(x, xa, (0, group.in_features))
    y = _product(x, _stacked(group, bases, layer, x.dtype, packed.b_packed, below=False), (1, 1))
    # Who goes on with y has xa: cut out only when the backward asks for it, it would keep all of x alive until then.
    y, xa = jax.lax.optimization_barrier((y, xa))
    return y if bias is None else y + bias.astype(y.dtype), xa, x


def backward(
    group: GroupLayout, dy: Any, bases: Any, packed: PackedAdapters, layer: Any = None, masks: Masks | None = None
) -> tuple[Any, Any]:
    """(dx ``[tokens, in]``, dy with ``dy·sB`` behind its rows) from dy ``[tokens, out + pad]``, padded."""
    if group.pad:
        dy = append_product(dy, packed.b_packed.T, interpret=group.interpret)
    # With zeros in A's place the product has the same operands, and W alone is multiplied.
    below = packed.a_packed if masks is None else jnp.zeros_like(packed.a_packed)
    dx = _product(dy, _stacked(group, bases, layer, dy.dtype, below, below=True), (1, 0))
    if masks is not None:
        dx = _dropout(group).input_gradient(dx, dy[:, group.out_features :], packed.a_packed, masks)
    return dx, dy


def gradients(group: GroupLayout, x: Any, xa: Any, dy: Any, masks: Masks | None = None) -> tuple[Any, ...]:
    """(dA, dB) or None of each layer, float32.

    x ``[tokens, in or more]``, xa and dy as `forward` and `backward` returned them.
    """
    if group.rank == 0:
        return (None,) * len(group.outs)
    if masks is not None:
        da = _dropout(group).gradient_a(dy[:, group.out_features :], x, masks, group.in_features)
    else:
        da = low_rank_gradient(x, dy, group.pad, interpret=group.interpret)[: group.in_features].T
    db = low_rank_gradient(dy, xa, group.pad, interpret=group.interpret)
    found, row, column = [], 0, 0
    for rows, rank, scale in zip(group.outs, group.ranks, group.scales, strict=True):
        own = db[row : row + rows, column : column + rank]
        found.append((da[column : column + rank], scale * own) if rank else None)
        row, column = row + rows, column + rank
    return tuple(found)


def _dropout(group: GroupLayout) -> Any:
    """The module with the products behind a dropout."""
    return dropout_ops if group.interpret else dropout_kernels


def _stacked(group: GroupLayout, bases: Any, layer: Any, dtype: Any, packed: Any, below: bool) -> Any:
    """The layers' weights one below the other, and the adapters' block, `packed`, below them or beside."""
    place, shape = (0, group.in_features), (group.out_features, group.in_features + group.pad)
    if below:
        place, shape = (group.out_features, 0), (group.out_features + group.pad, group.in_features)
    if not any(isinstance(base, NF4) for base in bases):
        weights = [_one(base, layer).astype(dtype) for base in bases]
        return jnp.concatenate([jnp.concatenate(weights), packed], axis=0 if below else 1)
    matrix, start = None, 0
    for base, rows in zip(bases, group.outs, strict=True):
        if isinstance(base, NF4):
            matrix = dequantize_rows(base, dtype, shape, start, into=matrix, layer=layer, interpret=group.interpret)
        else:
            matrix = jnp.zeros(shape, dtype) if matrix is None else matrix
            matrix = jax.lax.dynamic_update_slice(matrix, _one(base, layer).astype(dtype), (start, 0))
        start += rows
    assert matrix is not None
    return jax.lax.dynamic_update_slice(matrix, packed, place)


def _one(base: Any, layer: Any) -> Any:
    return base if layer is None else jax.lax.dynamic_index_in_dim(base, layer, keepdims=False)


def _product(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=a.dtype)
