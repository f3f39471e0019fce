"""Decoding as one program a burst of tokens, its layers one after the other, over the blocks' `step`.

NF4 layers that share their input are one `nf4_matvec`, their adapters two small products beside it, from copies in the compute
dtype that a burst makes once. Rotation and cache write are one op and so is the attention over the slots; both know the caches
of each layer by itself, which a burst updates in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend import sampling
from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.linear import TRAINED
from jaxsloth.jax_backend.run import Run
from jaxsloth.models.spec import Rope
from jaxsloth.sampling import Variant


@jax.jit
def split(caches: Sequence[Cache]) -> list[Cache]:
    """Each layer's caches ``[batch, capacity, kv_heads, head_dim]`` from those stacked by place in the period."""
    return [Cache(one.keys[i], one.values[i]) for i in range(caches[0].keys.shape[0]) for one in caches]


@partial(jax.jit, static_argnames=("period",))
def stacked(caches: Sequence[Cache], period: int) -> tuple[Cache, ...]:
    """The inverse of `split`."""
    return tuple(jax.tree.map(lambda *layers: jnp.stack(layers), *caches[place::period]) for place in range(period))


@partial(jax.jit, static_argnames=("structure", "ropes", "variant", "count"), donate_argnums=(2,))
def say(
    trained: Any,
    frozen: Any,
    caches: list[Cache],
    state: Any,
    numbers: Any,
    frequencies: Any,
    structure: Any,
    ropes: tuple[tuple[Rope, float], ...],
    variant: Variant,
    count: int,
) -> tuple[Any, Any, Any]:
    """(`count` tokens that follow state["tokens"], int32 ``[batch, count]``, the state behind them, the caches).

    state: tokens int32 ``[batch]``, yet to be appended; positions int32 ``[batch, 1]``, theirs; first int32 ``[batch]``, each
    row's first slot that counts; slot int32, the one to be written; kept and numbers: of `sampling.begin`. Nothing of it waits
    for the host.
    """
    decoder = nnx.merge(structure, trained, frozen)
    blocks = tuple(decoder.model.layers)
    packed = [block.packed(decoder.dtype) for block in blocks]
    layers, head = nnx.split(decoder.model.layers, TRAINED, ...), decoder.head()

    def step(carried: Any, _: Any) -> Any:
        caches, state = carried
        x = decoder.model.embed_tokens.forward(state["tokens"])
        tables = tuple(
            tuple(table[:, 0] for table in pair) for pair in decoder.rope_tables(state["positions"], ropes, frequencies)
        )
        # A burst may go on past the tokens that are wanted, and past the end: as XLA's updates do, the last slot takes them.
        slot = jnp.minimum(state["slot"], caches[0].keys.shape[1] - 1)
        run = Run(tuple(rope for rope, _ in ropes), tables, state["first"], used=slot, decoding=True)
        delta, written, period = jnp.zeros_like(x), [], len(blocks)
        for index in range(len(caches) // period):
            own = caches[index * period : (index + 1) * period]
            x, delta, own = _period(*layers, x, delta, own, packed, run, jnp.int32(index))
            written += own
        positions, slot = state["positions"] + 1, state["slot"] + 1
        logits = head.forward(decoder.model.norm.forward(x + delta))
        said, tokens, kept = sampling.choose(logits, numbers, state["kept"], slot, positions[:, 0], variant)
        after = {"tokens": tokens, "positions": positions, "first": state["first"], "slot": slot, "kept": kept}
        return (written, after), said

    (caches, state), said = jax.lax.scan(step, (caches, state), None, length=count)
    return said.T, state, caches


# A function of its own under jit: layers that follow one another are traced and lowered once instead of each.
@partial(jax.jit, static_argnums=(0,))
def _period(
    structure: Any,
    trained: Any,
    frozen: Any,
    x: Any,
    delta: Any,
    caches: Sequence[Cache],
    packed: Any,
    run: Run,
    index: Any,
) -> tuple[Any, Any, list[Cache]]:
    """One repetition of the period: the residual stream comes and goes as x and what is yet to be added to it."""
    written = []
    trained, packed = (jax.tree.map(lambda stack: stack[index], tree) for tree in (trained, packed))
    for place, block in enumerate(nnx.merge(structure, trained, frozen)):
        x, delta, cache = block.step(x, delta, caches[place], run.at(index), packed[place])
        written.append(cache)
    return x, delta, written
