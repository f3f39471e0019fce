"""The 8-bit AdamW step in plain JAX: tensors of one size are stepped together, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxsloth.kernels.adamw_8bit.contract import BLOCK, Moments, blocks_of, check_sizes, runs
from jaxsloth.kernels.nf4.contract import dynamic_code
from jaxsloth.kernels.nf4.xla_ops import dynamic_codes

FIELDS = ["exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"]
jax.tree_util.register_dataclass(Moments, data_fields=FIELDS, meta_fields=[])


def adamw_8bit(
    parameter: Float32[Array, " n"],
    gradient: Float32[Array, " n"],
    moments: Moments,
    factors: Float32[Array, "3"],
    *,
    sizes: tuple[int, ...],
    betas: tuple[float, float],
    eps: float,
) -> tuple[Float32[Array, " n"], Moments]:
    """The parameter and the moments after the step; see the contract.

    Raises:
        ValueError: sizes do not make up the parameter.
    """
    return over_runs(_update, parameter, gradient, moments, factors, sizes=sizes, betas=betas, eps=eps)


def over_runs(
    update: Callable[..., tuple[Array, Moments]],
    parameter: Array,
    gradient: Array,
    moments: Moments,
    factors: Array,
    *,
    sizes: tuple[int, ...],
    betas: tuple[float, float],
    eps: float,
) -> tuple[Array, Moments]:
    """`update` of every run of tensors of one size, joined; it takes how many there are after the factors."""
    check_sizes(sizes, parameter.size, moments.exp_avg_absmax.size)
    done, value, block = [], 0, 0
    for size, count in runs(sizes):
        values, blocks = slice(value, value + count * size), slice(block, block + count * blocks_of(size))
        one = Moments(
            moments.exp_avg[values],
            moments.exp_avg_absmax[blocks],
            moments.exp_avg_sq[values],
            moments.exp_avg_sq_absmax[blocks],
        )
        done.append(update(parameter[values], gradient[values], one, factors, count, betas, eps))
        value, block = values.stop, blocks.stop
    return done[0] if len(done) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *done)


def _update(
    parameter: Array, gradient: Array, moments: Moments, factors: Array, count: int, betas: tuple[float, float], eps: float
) -> tuple[Array, Moments]:
    """The step of `count` tensors of one size."""
    size = parameter.size // count

    def in_blocks(array: Array) -> Array:
        rows = jnp.pad(array.reshape(count, size), ((0, 0), (0, -size % BLOCK)))
        return rows.reshape(-1, BLOCK)

    def flat(blocks: Array) -> Array:
        return blocks.reshape(count, -1)[:, :size].reshape(-1)

    def moment(codes: Array, absmax: Array, signed: bool) -> Array:
        return jnp.asarray(dynamic_code(signed=signed))[in_blocks(codes).astype(jnp.int32)] * absmax[:, None]

    def store(values: Array, signed: bool) -> tuple[Array, Array]:
        # What pads the last block must not become its maximum: code 0 stands for -0.993 of it.
        values = in_blocks(flat(values))
        absmax = jnp.max(jnp.abs(values), axis=1)
        reciprocals = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
        return flat(dynamic_codes(values, absmax, reciprocals, signed)), absmax

    decay, step_size, root = factors
    grad = in_blocks(gradient)
    exp_avg = moment(moments.exp_avg, moments.exp_avg_absmax, True) * betas[0] + grad * (1.0 - betas[0])
    exp_avg_sq = moment(moments.exp_avg_sq, moments.exp_avg_sq_absmax, False) * betas[1] + grad * grad * (1.0 - betas[1])
    update = exp_avg * step_size / (jnp.sqrt(exp_avg_sq) / root + eps)
    after: Any = Moments(*store(exp_avg, True), *store(exp_avg_sq, False))
    return parameter * decay - flat(update), after
