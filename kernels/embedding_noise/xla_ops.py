"""NEFTune's noise in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, UInt32

from jaxsloth.kernels.embedding_noise.contract import PARITY, ROTATIONS


def threefry_2x32(
    key: UInt32[Array, "2"], first: UInt32[Array, "..."], second: UInt32[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """The two words of a block cipher of 20 rounds (Salmon et al. 2011) on the counters (first, second)."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x, y = first + schedule[0], second + schedule[1]
    for group in range(5):
        for by in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << jnp.uint32(by)) | (y >> jnp.uint32(32 - by))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def embedding_noise(
    key: UInt32[Array, "2"], rows: Int[Array, " batch"], segments: Int[Array, "batch length"], channels: int, *, alpha: float
) -> Float32[Array, "batch length channels"]:
    """What is to be added to the embeddings; see the contract. `key` may be traced: another step needs no other program."""
    batch, length = segments.shape
    places = jnp.arange(batch)[:, None]
    counts = jnp.zeros((batch, length + 1), jnp.float32).at[places, segments].add(1.0)[places, segments]
    magnitude = jnp.where(segments == 0, 0.0, alpha / jnp.sqrt(counts * channels))
    counter = jax.lax.iota(jnp.uint32, length * channels).reshape(1, length, channels)
    first, second = jnp.broadcast_arrays(rows.astype(jnp.uint32)[:, None, None], counter)
    word = threefry_2x32(key, first, second)[0] >> jnp.uint32(8)
    uniform = word.astype(jnp.float32) * jnp.float32(2.0**-23) - 1.0
    return uniform * magnitude[..., None]
