"""All blocks from ops, differentiated by JAX: the judge of the written pass, and what runs where that is not wanted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.linear import PRODUCT, TRAINED
from jaxsloth.jax_backend.run import Run


def stream(layers: Any, x: Any, run: Run, count: int, caches: Any = None, mode: str = "none") -> tuple[Any, Any]:
    """(the residual stream ``[batch, length, hidden]`` behind all blocks; the caches with this pass written, stacked).

    layers: one stack of blocks a place in the period, which is repeated `count` times. mode: what is kept for the backward;
    with none all that JAX keeps, with selective the linear layers' outputs, with full a period's input; offload is the same as
    full, where the host's memory is the device's.
    """
    structure, trained, frozen = nnx.split(layers, TRAINED, ...)

    def period(x: Any, scanned: Any) -> tuple[Any, Any]:
        layer, own, stacks = scanned
        written = []
        for place, block in enumerate(nnx.merge(structure, own, frozen)):
            x, cache = block.forward(x, run.at(layer), None if stacks is None else stacks[place])
            written.append(cache)
        return x, None if stacks is None else tuple(written)

    body = period
    if mode != "none" and caches is None:
        policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if mode == "selective" else None
        body = jax.checkpoint(period, policy=policy)
    return jax.lax.scan(body, x, (jnp.arange(count, dtype=jnp.int32), trained, caches))
