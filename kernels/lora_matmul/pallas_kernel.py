"""Adapted linear layers that share their input as one product each way, on arrays with room behind their rows.

With the layers' weights stacked to ``W [out, in]``, their A to ``[rank, in]`` and their scaled B laid out block by block in
``[out, rank]``, all in one matrix ``M = [[W, sB], [A, 0]]`` of ``[out + room, in + room]``:

    [y, ·] = [x, x·Aᵀ] · Mᵀ        [dx, ·] = [dy, dy·sB] · M

Every array is wide: ``[tokens, width + room]`` with columns past `width` that hold nothing, so that ``x·Aᵀ`` and ``dy·sB`` are
written behind the rows in place by a kernel (`append_product`), and no product's operand is cut, padded or copied. The adapter
costs a few more columns of the product instead of reading and writing y once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsloth.kernels.jax_platform import precision_of
from jaxsloth.kernels.nf4.pallas_kernel import dequantize_rows
from jaxsloth.kernels.nf4.xla_ops import NF4  # from here, since this module makes it a pytree

ROOM = 64
# Tuned on an H200 (benchmarks, docs/performance.md).
DEPTH = 128  # columns of x that a step of the products takes
WIDTH, HEIGHT = 64, 32  # columns of x whose gradients a program forms, rows that a step of the sum takes
FEW_ROWS = 4096
PRODUCT_PROGRAMS, GRADIENT_PROGRAMS = 256, 528  # that a kernel should at least have


@dataclass(frozen=True)
class Group:
    """What is fixed about layers that share their input: outs and ranks one by one (rank 0: no adapter), scales likewise.

    A checkpointing policy finds the input that the backward needs as ``{name}.input``.
    """

    in_features: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    name: str = ""
    interpret: bool = False

    @property
    def out_features(self) -> int:
        return sum(self.outs)

    @property
    def rank(self) -> int:
        return sum(self.ranks)


def refuses(in_features: int, ranks: tuple[int, ...]) -> str | None:
    if sum(ranks) > ROOM:
        return f"has room for ranks of {ROOM} in all, and layers that share an input have {sum(ranks)}"
    return None if in_features % 64 == 0 else f"needs inputs that are a multiple of 64 wide, and one has {in_features}"


def _tile(ref: Any, rows: Any, columns: Any, row_end: int, column_end: int) -> Any:
    """``ref[rows, columns]``, zero outside of the first row_end rows and column_end columns."""
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return plgpu.load(ref.at[jnp.where(rows < row_end, rows, 0)[:, None], columns[None, :]], mask=inside, other=0.0)


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _append_kernel(x: Any, matrix: Any, out: Any, *, rows: int, width: int, height: int, steps: int, splits: int) -> None:
    """One program: `height` rows times a part of the columns. Without splits the products go behind the rows of x."""
    row = pl.program_id(0) * height + jnp.arange(height, dtype=jnp.int32)
    low = jnp.arange(ROOM, dtype=jnp.int32)
    first = pl.program_id(1) * steps

    def add(step: Any, total: Any) -> Any:
        column = (first + step) * DEPTH + jnp.arange(DEPTH, dtype=jnp.int32)
        return total + _dot(_tile(x, row, column, rows, width), _tile(matrix, low, column, ROOM, width), (1, 1))

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((height, ROOM), jnp.float32))
    inside = jnp.broadcast_to((row < rows)[:, None], (height, ROOM))
    if splits == 1:
        plgpu.store(out.at[row[:, None], width + low[None, :]], total.astype(out.dtype), mask=inside)
    else:
        plgpu.store(out.at[pl.program_id(1), row[:, None], low[None, :]], total, mask=inside)


def append_product(x: Any, matrix: Any, *, interpret: bool = False) -> Any:
    """x ``[tokens, width + ROOM]`` with ``x[:, :width]·matrixᵀ`` in its last columns, in place where x is not used again.

    matrix ``[ROOM, width]`` in x's dtype.
    """
    rows, width = x.shape[0], x.shape[1] - ROOM
    height = 16 if rows <= FEW_ROWS else 64
    steps = pl.cdiv(width, DEPTH)
    # Where the rows make few programs the columns are shared out too, and the parts summed behind.
    splits = min(steps, pl.cdiv(PRODUCT_PROGRAMS, pl.cdiv(rows, height)))
    steps = pl.cdiv(steps, splits)
    call = pl.pallas_call(
        partial(_append_kernel, rows=rows, width=width, height=height, steps=steps, splits=splits),
        out_shape=jax.ShapeDtypeStruct(*((x.shape, x.dtype) if splits == 1 else ((splits, rows, ROOM), jnp.float32))),
        grid=(pl.cdiv(rows, height), splits),
        input_output_aliases={0: 0} if splits == 1 else {},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="lora_append",
    )
    product = call(x, matrix)
    return product if splits == 1 else jax.lax.dynamic_update_slice(x, product.sum(axis=0).astype(x.dtype), (0, width))


def _gradient_kernel(x: Any, low: Any, out: Any, *, rows: int, first: int, steps: int) -> None:
    """One program: `WIDTH` columns of x, a part of the rows."""
    columns = pl.program_id(0) * WIDTH + jnp.arange(WIDTH, dtype=jnp.int32)
    room = jnp.arange(ROOM, dtype=jnp.int32)
    start = pl.program_id(1) * steps

    def add(step: Any, total: Any) -> Any:
        row = (start + step) * HEIGHT + jnp.arange(HEIGHT, dtype=jnp.int32)
        return total + _dot(_tile(x, row, columns, rows, x.shape[1]), _tile(low, row, first + room, rows, low.shape[1]), (0, 0))

    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((WIDTH, ROOM), jnp.float32))
    inside = jnp.broadcast_to((columns < x.shape[1])[:, None], (WIDTH, ROOM))
    plgpu.store(out.at[pl.program_id(1), columns[:, None], room[None, :]], total, mask=inside)


def low_rank_gradient(x: Any, low: Any, *, interpret: bool = False) -> Any:
    """``xᵀ·low[:, -ROOM:]``, float32 ``[columns of x, ROOM]``; x and low ``[tokens, …]`` of one dtype."""
    rows = x.shape[0]
    across, steps = pl.cdiv(x.shape[1], WIDTH), pl.cdiv(rows, HEIGHT)
    splits = min(steps, pl.cdiv(GRADIENT_PROGRAMS, across))
    steps = pl.cdiv(steps, splits)
    call = pl.pallas_call(
        partial(_gradient_kernel, rows=rows, first=low.shape[1] - ROOM, steps=steps),
        out_shape=jax.ShapeDtypeStruct((splits, x.shape[1], ROOM), jnp.float32),
        grid=(across, splits),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="lora_gradient",
    )
    parts = call(x, low)
    return parts[0] if splits == 1 else parts.sum(axis=0)


def _low_a(group: Group, adapters: Any, dtype: Any) -> Any:
    """``[ROOM, in]``: the layers' A one below the other, then zeros."""
    parts = [a.astype(dtype) for a, _ in (pair for pair in adapters if pair is not None)]
    parts.append(jnp.zeros((ROOM - group.rank, group.in_features), dtype))
    return jnp.concatenate(parts)


def _high_b(group: Group, adapters: Any, dtype: Any) -> Any:
    """``[out, ROOM]``: the layers' scaled B block by block, zeros around."""
    parts, start = [], 0
    for out, rank, scale, pair in zip(group.outs, group.ranks, group.scales, adapters, strict=True):
        if pair is None:
            parts.append(jnp.zeros((out, ROOM), dtype))
            continue
        own = (scale * pair[1]).astype(dtype)
        parts.append(jnp.pad(own, ((0, 0), (start, ROOM - start - rank))))
        start += rank
    return jnp.concatenate(parts)


def _matrix(group: Group, bases: Any, low_a: Any, high_b: Any, layer: Any, dtype: Any) -> Any:
    """``M [out + ROOM, in + ROOM]``."""
    out, in_ = group.out_features, group.in_features
    if not any(isinstance(base, NF4) for base in bases):
        weights = [base if layer is None else jax.lax.dynamic_index_in_dim(base, layer, keepdims=False) for base in bases]
        top = jnp.concatenate([jnp.concatenate([weight.astype(dtype) for weight in weights]), high_b], axis=1)
        return jnp.concatenate([top, jnp.pad(low_a, ((0, 0), (0, ROOM)))])
    matrix, start = None, 0
    for base, rows in zip(bases, group.outs, strict=True):
        shape = (out + ROOM, in_ + ROOM)
        matrix = dequantize_rows(base, dtype, shape, start, into=matrix, layer=layer, interpret=group.interpret)
        start += rows
    assert matrix is not None
    matrix = jax.lax.dynamic_update_slice(matrix, high_b, (0, in_))
    return jax.lax.dynamic_update_slice(matrix, jnp.pad(low_a, ((0, 0), (0, ROOM))), (out, 0))


def _product(a: Any, b: Any, contract: tuple[int, int], dtype: Any) -> Any:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def lora_group(group: Group, x: Any, bases: Any, adapters: Any, bias: Any, layer: Any) -> Any:
    """``[tokens, out + ROOM]``, wide, from x ``[tokens, in + ROOM]``, wide.

    bases: dense ``[out, in]`` or NF4 each, stacked where `layer` is given. adapters: (A float32 ``[r, in]``, B float32 ``[out,
    r]``) or None each. bias: ``[out]`` or None. The frozen arguments get no gradients.
    """
    return _forward(group, x, bases, adapters, bias, layer)[0]


def _forward(group: Group, x: Any, bases: Any, adapters: Any, bias: Any, layer: Any) -> tuple[Any, Any]:
    low_a, high_b = _low_a(group, adapters, x.dtype), _high_b(group, adapters, x.dtype)
    x = checkpoint_name(append_product(x, low_a, interpret=group.interpret), f"{group.name}.input")
    y = _product(x, _matrix(group, bases, low_a, high_b, layer, x.dtype), (1, 1), x.dtype)
    if bias is not None:
        y = y + jnp.pad(bias.astype(y.dtype), (0, ROOM))
    return y, (x, bases, adapters, layer)


def _backward(group: Group, kept: Any, dy: Any) -> tuple[Any, ...]:
    x, bases, adapters, layer = kept
    in_ = group.in_features
    low_a, high_b = _low_a(group, adapters, x.dtype), _high_b(group, adapters, x.dtype)
    dy = append_product(dy, high_b.T, interpret=group.interpret)
    dx = _product(dy, _matrix(group, bases, low_a, high_b, layer, x.dtype), (1, 0), x.dtype)
    da = low_rank_gradient(x, dy, interpret=group.interpret).T
    db = low_rank_gradient(dy, x, interpret=group.interpret)
    gradients, row, column = [], 0, 0
    for rows, rank, scale, pair in zip(group.outs, group.ranks, group.scales, adapters, strict=True):
        if pair is None:
            gradients.append(None)
        else:
            own = db[row : row + rows, column : column + rank]
            gradients.append((da[column : column + rank, :in_], scale * own))
        row, column = row + rows, column + rank
    return dx, None, tuple(gradients), None, None


lora_group.defvjp(_forward, _backward)
