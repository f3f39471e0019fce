"""Draws by Gumbel noise in plain JAX."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

from jaxsloth.kernels.dropout.xla_ops import philox_4x32
from jaxsloth.kernels.gumbel.contract import DOMAIN, MOST, SERIES, SERIES_BELOW, share_of


def noise(
    ids: Int[Array, "batch n"] | None,
    keys: UInt32[Array, "batch 2"],
    rows: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    *,
    vocab: int,
) -> Float32[Array, "batch n"]:
    """What is added to the scores."""
    share = share_of(vocab)
    if ids is not None and ids.shape[1] > share:  # a word serves four tokens
        return jnp.take_along_axis(noise(None, keys, rows, positions, vocab=vocab), ids, axis=1)
    place = jnp.arange(share, dtype=jnp.uint32)[None] if ids is None else ids.astype(jnp.uint32) % jnp.uint32(share)
    row, position = rows.astype(jnp.uint32)[:, None], positions.astype(jnp.uint32)[:, None]
    words = philox_4x32((keys[:, :1], keys[:, 1:]), (place, position, row, jnp.full_like(row, DOMAIN)))
    words = jnp.broadcast_arrays(*words)
    if ids is None:
        word = jnp.concatenate(words, axis=1)[:, :vocab]
    else:
        quarter = ids.astype(jnp.uint32) // jnp.uint32(share)
        word = jnp.select([quarter == index for index in range(3)], words[:3], words[3])
    return noise_of(word)


def noise_of(word: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    v = jnp.minimum((word.astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-32), jnp.float32(MOST))
    series = jnp.full_like(v, SERIES[-1])
    for factor in SERIES[-2::-1]:
        series = series * v + jnp.float32(factor)
    return -jnp.log(jnp.where(v < SERIES_BELOW, series * v, -jnp.log(1.0 - v)))


def draw(
    scores: Float32[Array, "batch n"],
    ids: Int[Array, "batch n"] | None,
    keys: UInt32[Array, "batch 2"],
    rows: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    *,
    vocab: int,
) -> Int[Array, " batch"]:
    """See the contract."""
    return jnp.argmax(scores + noise(ids, keys, rows, positions, vocab=vocab), axis=1)
