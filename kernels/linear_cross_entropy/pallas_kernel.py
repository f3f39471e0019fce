"""The softmax over a chunk of logits as a Pallas kernel (lowered through Triton): float32 logits are read twice, and their
gradient is written once, as the next product reads it.

One program a token. First pass: ``m = max z``, ``s = Σ exp(z - m)``, the loss is ``m + log s - z[target]``; second pass: the
gradient ``exp(z - m)/s - 1[target]``, times ``1 - (z/c)²`` under a soft cap c. The products are XLA's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int

SIZE, WARPS = 4096, 8  # columns at once; `benchmarks.tiles` measures others


def _soft_capped(z: Any, soft_cap: float | None) -> tuple[Any, Any]:
    """(z behind the cap, the cap's derivative)."""
    if soft_cap is None:
        return z, 1.0
    fall = 1.0 / (1.0 + jnp.exp(z * (2.0 / soft_cap)))  # tanh(x) = 1 - 2 / (1 + exp(2x))
    return soft_cap * (1.0 - 2.0 * fall), 4.0 * fall * (1.0 - fall)


def _softmax_kernel(
    targets: Any, logits: Any, losses: Any, *dlogits: Any, vocab: int, size: int, soft_cap: float | None, ignore_index: int
) -> None:
    """dlogits: one array, which may be the memory of `logits`, or none."""
    row, target = pl.program_id(0), targets[pl.program_id(0)].astype(jnp.int32)
    valid = target != ignore_index
    chosen = jnp.where(valid, target, 0)
    steps = pl.cdiv(vocab, size)
    picked, _ = _soft_capped(logits[row, chosen], soft_cap)

    def part(step: Any) -> tuple[Any, Any, Any, Any]:
        """(columns, which of them there are, z, the cap's derivative)."""
        column = step * size + jnp.arange(size, dtype=jnp.int32)
        inside = column < vocab
        # The interpreter reads what the mask hides too.
        raw = plgpu.load(logits.at[row, jnp.minimum(column, vocab - 1)], mask=inside, other=0.0)
        return column, inside, *_soft_capped(raw, soft_cap)

    def add(step: Any, carry: Any) -> Any:
        """Every lane keeps its own maximum and sum, put together once at the end."""
        top, total = carry
        _, inside, z, _ = part(step)
        above = jnp.where(inside, jnp.maximum(top, z), top)
        return above, total * jnp.exp(top - above) + jnp.where(inside, jnp.exp(z - above), 0.0)

    start = jnp.full(size, -1e30, jnp.float32), jnp.zeros(size, jnp.float32)
    top, total = jax.lax.fori_loop(0, steps, add, start)
    highest = jnp.max(top)
    log_sum = highest + jnp.log(jnp.sum(total * jnp.exp(top - highest)))
    losses[row] = jnp.where(valid, log_sum - picked, 0.0)

    def write(step: Any, carry: Any) -> Any:
        column, inside, z, dtanh = part(step)
        dlogit = (jnp.exp(z - log_sum) - jnp.where(column == chosen, 1.0, 0.0)) * dtanh
        plgpu.store(dlogits[0].at[row, column], jnp.where(valid, dlogit, 0.0).astype(dlogits[0].dtype), mask=inside)
        return carry

    if dlogits:
        jax.lax.fori_loop(0, steps, write, 0)


def softmax(
    logits: Float32[Array, "chunk vocab"],
    targets: Int[Array, " chunk"],
    soft_cap: float | None,
    ignore_index: int,
    dtype: Any,
    *,
    interpret: bool = False,
) -> tuple[Float32[Array, " chunk"], Float[Array, "chunk vocab"] | None]:
    """(the loss of every token, 0 where it is ignored; its gradient by the logits before their cap, rounded to `dtype`).

    dtype None forms no gradient. A float32 one takes the memory of `logits`.
    """
    rows, vocab = logits.shape
    outs = [jax.ShapeDtypeStruct((rows,), jnp.float32)]
    if dtype is not None:
        outs.append(jax.ShapeDtypeStruct(logits.shape, dtype))
    size = min(SIZE, pl.next_power_of_2(vocab))
    call = pl.pallas_call(
        partial(_softmax_kernel, vocab=vocab, size=size, soft_cap=soft_cap, ignore_index=ignore_index),
        out_shape=outs,
        grid=(rows,),
        input_output_aliases={1: 1} if dtype is not None and jnp.dtype(dtype) == jnp.float32 else {},
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="softmax_loss",
    )
    losses, *dlogits = call(targets, logits)
    return losses, dlogits[0] if dlogits else None
