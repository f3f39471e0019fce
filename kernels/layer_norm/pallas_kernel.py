"""LayerNorm as Pallas kernels (lowered through Triton): a row is held whole in registers, read once and written once.

Forward, a row a program: the mean, then the variance around it. Backward, a run of rows a program, each summing its part of
dweight and dbias. The formulas are the contract's.
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


def _forward_kernel(x: Any, weight: Any, *rest: Any, hidden: int, width: int, eps: float) -> None:
    """rest: the bias where there is one, then y, mean and rstd."""
    *bias, y, mean, rstd = rest
    row, column = pl.program_id(0), jnp.arange(width, dtype=jnp.int32)
    inside = column < hidden
    values = plgpu.load(x.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
    average = jnp.sum(values) / hidden
    centred = jnp.where(inside, values - average, 0.0)
    reciprocal = jax.lax.rsqrt(jnp.sum(centred * centred) / hidden + eps)
    mean[row], rstd[row] = average, reciprocal
    result = centred * reciprocal * plgpu.load(weight.at[column], mask=inside, other=0.0).astype(jnp.float32)
    for shift in bias:
        result += plgpu.load(shift.at[column], mask=inside, other=0.0).astype(jnp.float32)
    plgpu.store(y.at[row, column], result.astype(y.dtype), mask=inside)


def _backward_kernel(
    x: Any, weight: Any, mean: Any, rstd: Any, dy: Any, dx: Any, *sums: Any, rows: int, each: int, hidden: int, width: int
) -> None:
    """sums: parts of dweight and, where there is a bias, of dbias."""
    program, column = pl.program_id(0), jnp.arange(width, dtype=jnp.int32)
    inside = column < hidden
    scale = plgpu.load(weight.at[column], mask=inside, other=0.0).astype(jnp.float32)

    def one_row(step: Any, totals: Any) -> Any:
        row = program * each + step
        valid = inside & (row < rows)
        row = jnp.minimum(row, rows - 1)
        grad = plgpu.load(dy.at[row, column], mask=valid, other=0.0).astype(jnp.float32)
        values = plgpu.load(x.at[row, column], mask=valid, other=0.0).astype(jnp.float32)
        n = jnp.where(valid, (values - mean[row]) * rstd[row], 0.0)
        g = grad * scale
        result = rstd[row] * (g - jnp.sum(g) / hidden - n * (jnp.sum(g * n) / hidden))
        plgpu.store(dx.at[row, column], result.astype(dx.dtype), mask=valid)
        return tuple(total + part for total, part in zip(totals, (grad * n, grad), strict=False))

    totals = jax.lax.fori_loop(0, each, one_row, tuple(jnp.zeros(width, jnp.float32) for _ in sums))
    for target, total in zip(sums, totals, strict=True):
        plgpu.store(target.at[program, column], total, mask=inside)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x: Array, weight: Array, bias: Array | None, eps: float, interpret: bool) -> Array:
    return _forward(x, weight, bias, eps, interpret)[0]


def _forward(x: Array, weight: Array, bias: Array | None, eps: float, interpret: bool) -> tuple[Array, Any]:
    rows, hidden = x.shape
    width = pl.next_power_of_2(hidden)
    number = jax.ShapeDtypeStruct((rows,), jnp.float32)
    call = pl.pallas_call(
        partial(_forward_kernel, hidden=hidden, width=width, eps=eps),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), number, number),
        grid=(rows,),
        compiler_params=_parameters(width),
        interpret=interpret,
        name="layer_norm_forward",
    )
    y, mean, rstd = call(x, weight) if bias is None else call(x, weight, bias)
    return y, (x, weight, bias, mean, rstd)


def _backward(eps: float, interpret: bool, kept: Any, dy: Array) -> tuple[Array, Array, Array | None]:
    del eps
    x, weight, bias, mean, rstd = kept
    rows, hidden = x.shape
    width, programs = pl.next_power_of_2(hidden), min(rows, PROGRAMS)
    part = jax.ShapeDtypeStruct((programs, hidden), jnp.float32)
    call = pl.pallas_call(
        partial(_backward_kernel, rows=rows, each=pl.cdiv(rows, programs), hidden=hidden, width=width),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), part, *(() if bias is None else (part,))),
        grid=(programs,),
        compiler_params=_parameters(width),
        interpret=interpret,
        name="layer_norm_backward",
    )
    dx, dweight, *dbias = call(x, weight, mean, rstd, dy)
    dweight = dweight.sum(axis=0).astype(weight.dtype)
    return dx, dweight, None if bias is None else dbias[0].sum(axis=0).astype(bias.dtype)


_layer_norm.defvjp(_forward, _backward)


def layer_norm(
    x: Float[Array, "*lead hidden"],
    weight: Float[Array, " hidden"],
    bias: Float[Array, " hidden"] | None = None,
    *,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "*lead hidden"]:
    """As xla_ops' function of this name, on CUDA."""
    if x.size == 0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    # Offsets are int32 in the kernel: more elements than that take several calls.
    most = (2**31 - 1) // rows.shape[1]
    pieces = [rows[start : start + most] for start in range(0, rows.shape[0], most)]
    done: list[Any] = [_layer_norm(piece, weight, bias, eps, interpret) for piece in pieces]
    return (done[0] if len(done) == 1 else jnp.concatenate(done)).reshape(x.shape)
