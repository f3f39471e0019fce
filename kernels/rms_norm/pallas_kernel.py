"""RMSNorm as Pallas kernels (lowered through Triton): a row is held whole in registers, read once and written once.

Forward, a row a program: ``rstd = 1 / sqrt(mean(x²) + eps)``, ``y = x·rstd·(offset + w)``, rstd kept.
Backward, a run of rows a program, each summing its part of dweight: with ``n = x·rstd`` and ``g = dy·(offset + w)``:
``dx = rstd·(g - n·mean(g·n))``, ``dweight = Σ dy·n``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

PROGRAMS = 512  # of the backward: four for each multiprocessor of an H200


def _parameters(width: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=4 if width <= 2048 else 8 if width <= 8192 else 16, num_stages=1)


def _forward_kernel(x: Any, weight: Any, y: Any, rstd: Any, *, hidden: int, width: int, eps: float, offset: float) -> None:
    row, column = pl.program_id(0), jnp.arange(width, dtype=jnp.int32)
    inside = column < hidden
    values = plgpu.load(x.at[row, column], mask=inside, other=0.0)
    _normalise(values, weight, y, rstd, hidden, eps, offset, (row, column, inside))


def _normalise(values: Any, weight: Any, y: Any, rstd: Any, hidden: int, eps: float, offset: float, place: Any) -> None:
    """Writes one row and its reciprocal; values are the row's, zero past `hidden`."""
    row, column, inside = place
    dtype, values = values.dtype, values.astype(jnp.float32)
    scale = plgpu.load(weight.at[column], mask=inside, other=0.0).astype(jnp.float32)
    reciprocal = jax.lax.rsqrt(jnp.sum(values * values) / hidden + eps)
    rstd[row] = reciprocal
    normalised = values * reciprocal
    # Llama rounds before it multiplies by the weight.
    result = normalised.astype(dtype).astype(jnp.float32) * scale if offset == 0.0 else normalised * (offset + scale)
    plgpu.store(y.at[row, column], result.astype(y.dtype), mask=inside)


def _backward_kernel(
    x: Any,
    weight: Any,
    rstd: Any,
    dy: Any,
    *rest: Any,
    rows: int,
    each: int,
    hidden: int,
    width: int,
    offset: float,
    adds: bool = False,
    needs_dweight: bool = True,
) -> None:
    """rest: with `adds` the gradient that comes along the residual stream, then dx, then with `needs_dweight` dweight."""
    residual = rest[0] if adds else None
    dx = rest[1] if adds else rest[0]
    program, column = pl.program_id(0), jnp.arange(width, dtype=jnp.int32)
    inside = column < hidden
    scale = offset + plgpu.load(weight.at[column], mask=inside, other=0.0).astype(jnp.float32)

    def one_row(step: Any, total: Any) -> Any:
        row = program * each + step
        valid = inside & (row < rows)
        row = jnp.minimum(row, rows - 1)
        grad = plgpu.load(dy.at[row, column], mask=valid, other=0.0).astype(jnp.float32)
        n = plgpu.load(x.at[row, column], mask=valid, other=0.0).astype(jnp.float32) * rstd[row]
        g = grad * scale
        result = rstd[row] * (g - n * (jnp.sum(g * n) / hidden))
        if residual is not None:
            # Rounded before the sum, as two tensors added would be.
            along = plgpu.load(residual.at[row, column], mask=valid, other=0.0).astype(jnp.float32)
            result = result.astype(dx.dtype).astype(jnp.float32) + along
        plgpu.store(dx.at[row, column], result.astype(dx.dtype), mask=valid)
        return total + grad * n if needs_dweight else total

    total = jax.lax.fori_loop(0, each, one_row, jnp.zeros(width if needs_dweight else 1, jnp.float32))
    if needs_dweight:
        plgpu.store(rest[-1].at[program, column], total, mask=inside)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms_norm(x: Array, weight: Array, eps: float, offset: float, interpret: bool) -> Array:
    return _forward(x, weight, eps, offset, interpret)[0]


def _forward(x: Array, weight: Array, eps: float, offset: float, interpret: bool) -> tuple[Array, Any]:
    rows, hidden = x.shape
    width = pl.next_power_of_2(hidden)
    call = pl.pallas_call(
        partial(_forward_kernel, hidden=hidden, width=width, eps=eps, offset=offset),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)),
        grid=(rows,),
        compiler_params=_parameters(width),
        interpret=interpret,
        name="rms_norm_forward",
    )
    y, rstd = call(x, weight)
    return y, (x, weight, rstd)


def _backward(eps: float, offset: float, interpret: bool, kept: Any, dy: Array) -> tuple[Array, Array]:
    del eps
    x, weight, rstd = kept
    rows, hidden = x.shape
    width = pl.next_power_of_2(hidden)
    programs = min(rows, PROGRAMS)
    call = pl.pallas_call(
        partial(_backward_kernel, rows=rows, each=pl.cdiv(rows, programs), hidden=hidden, width=width, offset=offset),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((programs, hidden), jnp.float32)),
        grid=(programs,),
        compiler_params=_parameters(width),
        interpret=interpret,
        name="rms_norm_backward",
    )
    dx, parts = call(x, weight, rstd, dy)
    return dx, parts.sum(axis=0).astype(weight.dtype)


_rms_norm.defvjp(_forward, _backward)


def _add_kernel(
    x: Any, delta: Any, weight: Any, total: Any, y: Any, rstd: Any, *, hidden: int, width: int, eps: float, offset: float
) -> None:
    row, column = pl.program_id(0), jnp.arange(width, dtype=jnp.int32)
    inside = column < hidden
    values = plgpu.load(x.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
    values += plgpu.load(delta.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
    plgpu.store(total.at[row, column], values.astype(total.dtype), mask=inside)
    _normalise(values.astype(total.dtype), weight, y, rstd, hidden, eps, offset, (row, column, inside))


def add_norm(
    x: Array, delta: Array | None, weight: Array, *, eps: float, offset: float, pad: int, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """(``x + delta``; that normed, ``[rows, hidden + pad]`` with nothing in the last columns; the reciprocals, float32
    ``[rows]``) of ``[rows, hidden]``; without delta the first is x itself."""
    rows, hidden = x.shape
    width = pl.next_power_of_2(hidden)
    settings = {"hidden": hidden, "width": width, "eps": eps, "offset": offset}
    normed = (jax.ShapeDtypeStruct((rows, hidden + pad), x.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32))
    call = pl.pallas_call(
        partial(_forward_kernel if delta is None else _add_kernel, **settings),
        out_shape=normed if delta is None else (jax.ShapeDtypeStruct(x.shape, x.dtype), *normed),
        grid=(rows,),
        compiler_params=_parameters(width),
        interpret=interpret,
        name="rms_norm" if delta is None else "add_rms_norm",
    )
    return (x, *call(x, weight)) if delta is None else call(x, delta, weight)


def add_norm_backward(
    x: Array,
    weight: Array,
    rstd: Array,
    dy: Array,
    residual: Array | None,
    *,
    offset: float,
    pad: int = 0,
    interpret: bool = False,
) -> Array:
    """The gradient of x ``[rows, hidden]``: residual's, which comes along the stream, and the norm's. As wide as residual;
    without one, with `pad` columns behind it that hold nothing."""
    rows, hidden = x.shape
    width = pl.next_power_of_2(hidden)
    programs = min(rows, PROGRAMS)
    kernel = partial(
        _backward_kernel,
        rows=rows,
        each=pl.cdiv(rows, programs),
        hidden=hidden,
        width=width,
        offset=offset,
        adds=residual is not None,
        needs_dweight=False,
    )
    shape = (rows, hidden + pad) if residual is None else residual.shape
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        grid=(programs,),
        compiler_params=_parameters(width),
        interpret=interpret,
        name="add_rms_norm_backward",
    )
    return call(x, weight, rstd, dy) if residual is None else call(x, weight, rstd, dy, residual)


def rms_norm(
    x: Float[Array, "*lead hidden"],
    weight: Float[Array, " hidden"],
    *,
    eps: float,
    offset: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "*lead hidden"]:
    """Normalise the last axis to a root mean square of one and scale it by ``offset + weight``; x's dtype is kept."""
    if x.size == 0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    # Offsets are int32 in the kernel: more elements than that take several calls.
    pieces = [rows[start : start + _most_rows(rows)] for start in range(0, rows.shape[0], _most_rows(rows))]
    done = [_rms_norm(piece, weight, eps, offset, interpret) for piece in pieces]
    return (done[0] if len(done) == 1 else jnp.concatenate(done)).reshape(x.shape)


def _most_rows(rows: Array) -> int:
    return (2**31 - 1) // rows.shape[1]
