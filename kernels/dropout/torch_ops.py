"""Dropout masks from Philox-4x32 in plain torch: words held by 64-bit integers."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Int64

from jaxsloth.kernels.dropout.contract import LEVELS, MULTIPLIERS, ROUNDS, WEYL, share_of, threshold

MASK = 2**32 - 1
Words = tuple[Int64[torch.Tensor, "..."], ...]


def philox_4x32(key: Int64[torch.Tensor, "2 ..."], counter: Words) -> Words:
    """The four words at counters of four words (Salmon et al. 2011); all of them in 0..2**32 - 1, of shapes that broadcast with
    those of the two words of the key."""
    k0, k1 = key.unbind()
    a, b, c, d = counter
    for _ in range(ROUNDS):
        # A product beyond 2**63 comes out negative, with the right bits.
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = ((second >> 32) & MASK) ^ b ^ k0, second & MASK
        c, d = ((first >> 32) & MASK) ^ d ^ k1, first & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return a, b, c, d


@torch.no_grad()
def keep_mask(
    key: Int[torch.Tensor, "2"], rows: Int[torch.Tensor, " batch"], length: int, channels: int, *, rate: float
) -> Bool[torch.Tensor, "batch length channels"]:
    """True where an element is kept; see the contract.

    Args:
        key: two words in 0..2**32 - 1, int64.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    positions = torch.arange(length, device=rows.device).expand(rows.shape[0], length)
    return keep_tokens(key, rows[:, None].expand_as(positions), positions, channels, rate=rate)


def keep_tokens(
    key: Int[torch.Tensor, "2"],
    rows: Int[torch.Tensor, "*lead"],
    positions: Int[torch.Tensor, "*lead"],
    channels: int,
    *,
    rate: float,
) -> Bool[torch.Tensor, "*lead channels"]:
    """`keep_mask` of tokens that are given one by one."""
    bar = threshold(rate)
    places = torch.arange(share_of(channels), device=rows.device)
    row, position = rows.long()[..., None] & MASK, positions.long()[..., None]
    words = philox_4x32(key.long().to(rows.device), (places, position, row, torch.zeros_like(row)))
    halves = [half >= bar for word in words for half in (word % LEVELS, word >> 16)]
    return torch.cat(halves, dim=-1)[..., :channels]
