"""Threefry-2x32 masks in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from jaxsloth.kernels.dropout.contract import PARITY, ROTATIONS, threshold


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


def keep_mask(
    key: UInt32[Array, "2"], rows: Int[Array, " batch"], length: int, channels: int, *, rate: float
) -> Bool[Array, "batch length channels"]:
    """True where an element is kept; see the contract. `key` may be traced: another step needs no other program.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"a dropout rate must be in [0, 1), got {rate}")
    places = jax.lax.iota(jnp.uint32, length * channels).reshape(1, length, channels)
    first, second = jnp.broadcast_arrays(rows.astype(jnp.uint32)[:, None, None], places)
    return threefry_2x32(key, first, second)[0] >= jnp.uint32(threshold(rate))
