"""Dropout masks from Philox-4x32 in plain JAX, whose widest integers have 32 bits."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from jaxsloth.kernels.dropout.contract import MULTIPLIERS, ROUNDS, WEYL, share_of, threshold

Words = tuple[UInt32[Array, "..."], ...]


def high_word(word: UInt32[Array, "..."], factor: int) -> UInt32[Array, "..."]:
    """The upper 32 bits of ``word * factor``, from products of 16 bits."""
    half = jnp.uint32(0xFFFF)
    low, high = word & half, word >> 16
    low_factor, high_factor = jnp.uint32(factor & 0xFFFF), jnp.uint32(factor >> 16)
    across, back = low * high_factor, high * low_factor
    middle = ((low * low_factor) >> 16) + (across & half) + (back & half)
    return high * high_factor + (across >> 16) + (back >> 16) + (middle >> 16)


def philox_4x32(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    counter: Words,
    high: Callable[[UInt32[Array, "..."], int], UInt32[Array, "..."]] = high_word,
) -> Words:
    """The four words at counters of four words (Salmon et al. 2011); their shapes and the key's broadcast.
    high: what forms `high_word`."""
    k0, k1 = key
    a, b, c, d = counter
    for _ in range(ROUNDS):
        a, b, c, d = (
            high(c, MULTIPLIERS[1]) ^ (b ^ k0),
            c * jnp.uint32(MULTIPLIERS[1]),
            high(a, MULTIPLIERS[0]) ^ (d ^ k1),
            a * jnp.uint32(MULTIPLIERS[0]),
        )
        k0, k1 = k0 + jnp.uint32(WEYL[0]), k1 + jnp.uint32(WEYL[1])
    return a, b, c, d


def keep_mask(
    key: UInt32[Array, "2"], rows: Int[Array, " batch"], length: int, channels: int, *, rate: float
) -> Bool[Array, "batch length channels"]:
    """True where an element is kept; see the contract. `key` may be traced: another step needs no other program.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows.shape[0], length))
    return keep_tokens(key, jnp.broadcast_to(rows[:, None], positions.shape), positions, channels, rate=rate)


def keep_tokens(
    key: UInt32[Array, "2"], rows: Int[Array, "*lead"], positions: Int[Array, "*lead"], channels: int, *, rate: float
) -> Bool[Array, "*lead channels"]:
    """`keep_mask` of tokens that are given one by one."""
    bar = jnp.uint32(threshold(rate))
    places = jnp.arange(share_of(channels), dtype=jnp.uint32)
    row, position = rows.astype(jnp.uint32)[..., None], positions.astype(jnp.uint32)[..., None]
    words = philox_4x32((key[0], key[1]), (places, position, row, jnp.zeros_like(row)))
    halves = [half >= bar for word in words for half in (word & jnp.uint32(0xFFFF), word >> 16)]
    return jnp.concatenate(halves, axis=-1)[..., :channels]
