"""The 8-bit AdamW step as a Pallas kernel (lowered through Triton), one call for every run of tensors of one size.

One program steps `TILE` blocks of up to 256 values, as the Triton kernel does, in place; the last block of a tensor may be
shorter, and is read and written no further.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float32

from jaxsloth.kernels.adamw_8bit.contract import BLOCK, Moments
from jaxsloth.kernels.adamw_8bit.xla_ops import over_runs
from jaxsloth.kernels.nf4.contract import dynamic_code, step_lookup

TILE = 4


def _store(values: Any, lookup: Any, codes: Any, absmax: Any, place: Any, inside: Any, tile: Any, within: Any) -> None:
    maximum = jnp.max(jnp.abs(values), axis=1)
    # A block of zeros has no scale; its codes are 0.
    reciprocal = jnp.where(maximum > 0.0, 1.0 / jnp.where(maximum > 0.0, maximum, 1.0), 0.0)
    scaled = jnp.clip(values * reciprocal[:, None], -1.0, 1.0)
    # A clip that changes nothing keeps product and sum from being fused: bitsandbytes rounds each.
    step = (jnp.clip((scaled + 1.0) * 0.5 * 65535.0, 0.0, 65535.0) + 0.5).astype(jnp.int32)
    found = jnp.where(maximum[:, None] > 0.0, lookup[jnp.clip(step, 0, 65535)], jnp.uint8(0))
    plgpu.store(codes.at[place], found, mask=inside)
    plgpu.store(absmax.at[tile], maximum, mask=within)


def _kernel(
    parameter: Any,
    gradient: Any,
    exp_avg: Any,
    exp_avg_absmax: Any,
    exp_avg_sq: Any,
    exp_avg_sq_absmax: Any,
    factors: Any,
    code: Any,
    code_sq: Any,
    lookup: Any,
    lookup_sq: Any,
    *outs: Any,
    blocks: int,
    each: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    size = parameter.shape[1]
    tile = jnp.arange(TILE, dtype=jnp.int32) + pl.program_id(0) * TILE
    within = tile < blocks
    column = (tile % each * BLOCK)[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
    inside = within[:, None] & (column < size)
    place = jnp.broadcast_to((tile // each)[:, None], column.shape), column

    def moment(book: Any, codes: Any, absmax: Any) -> Any:
        scale = plgpu.load(absmax.at[tile], mask=within, other=0.0)
        return book[plgpu.load(codes.at[place], mask=inside, other=0).astype(jnp.int32)] * scale[:, None]

    grad = plgpu.load(gradient.at[place], mask=inside, other=0.0)
    m = moment(code, exp_avg, exp_avg_absmax) * betas[0] + grad * (1.0 - betas[0])
    v = moment(code_sq, exp_avg_sq, exp_avg_sq_absmax) * betas[1] + grad * grad * (1.0 - betas[1])
    # Code 0 of m is no zero: what lies beyond a block must not become its maximum.
    m, v = jnp.where(inside, m, 0.0), jnp.where(inside, v, 0.0)
    update = m * factors[1] / (jnp.sqrt(v) / factors[2] + eps)
    before = plgpu.load(parameter.at[place], mask=inside, other=0.0)
    plgpu.store(outs[0].at[place], before * factors[0] - update, mask=inside)
    _store(m, lookup, outs[1], outs[2], place, inside, tile, within)
    _store(v, lookup_sq, outs[3], outs[4], place, inside, tile, within)


def _update(
    parameter: Array,
    gradient: Array,
    moments: Moments,
    factors: Array,
    count: int,
    betas: tuple[float, float],
    eps: float,
    *,
    interpret: bool,
) -> tuple[Array, Moments]:
    """The step of `count` tensors of one size."""
    rows = (count, parameter.size // count)
    blocks = moments.exp_avg_absmax.size
    state = (
        moments.exp_avg.reshape(rows),
        moments.exp_avg_absmax,
        moments.exp_avg_sq.reshape(rows),
        moments.exp_avg_sq_absmax,
    )
    updated = (parameter.reshape(rows), *state)
    call = pl.pallas_call(
        partial(_kernel, blocks=blocks, each=blocks // count, betas=betas, eps=eps),
        out_shape=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in updated),
        grid=(pl.cdiv(blocks, TILE),),
        input_output_aliases={0: 0, 2: 1, 3: 2, 4: 3, 5: 4},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="adamw_8bit",
    )
    books = [jnp.asarray(table(signed=signed)) for table in (dynamic_code, step_lookup) for signed in (True, False)]
    new, *after = call(updated[0], gradient.reshape(rows), *state, factors, *books)
    return new.reshape(-1), Moments(after[0].reshape(-1), after[1], after[2].reshape(-1), after[3])


def adamw_8bit(
    parameter: Float32[Array, " n"],
    gradient: Float32[Array, " n"],
    moments: Moments,
    factors: Float32[Array, "3"],
    *,
    sizes: tuple[int, ...],
    betas: tuple[float, float],
    eps: float,
    interpret: bool = False,
) -> tuple[Float32[Array, " n"], Moments]:
    """As xla_ops' function of this name, on CUDA, for fewer than 2**31 values."""
    update = partial(_update, interpret=interpret)
    return over_runs(update, parameter, gradient, moments, factors, sizes=sizes, betas=betas, eps=eps)
