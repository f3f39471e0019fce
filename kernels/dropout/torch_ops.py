"""Dropout masks from Threefry-2x32 in plain torch: 32-bit integers that wrap."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Int32, Int64

from jaxsloth.kernels.dropout.contract import PARITY, ROTATIONS, threshold

SIGN = 2**31


def _rotate_left(word: Int32[torch.Tensor, "..."], by: int) -> Int32[torch.Tensor, "..."]:
    # The right shift of a signed integer copies its sign; the mask takes the copies away.
    return (word << by) | ((word >> (32 - by)) & ((1 << by) - 1))


def _as_int32(word: Int64[torch.Tensor, "..."]) -> Int32[torch.Tensor, "..."]:
    """The same 32 bits as a signed integer."""
    return (((word & 0xFFFFFFFF) ^ SIGN) - SIGN).to(torch.int32)


def threefry_2x32(
    key: Int[torch.Tensor, "2"], first: Int32[torch.Tensor, "..."], second: Int32[torch.Tensor, "..."]
) -> tuple[Int32[torch.Tensor, "..."], Int32[torch.Tensor, "..."]]:
    """The two words of a block cipher of 20 rounds (Salmon et al. 2011) on the counters (first, second), as int32 bits."""
    low, high = _as_int32(key.long()).unbind()
    schedule = (low, high, low ^ high ^ PARITY)
    x, y = first + schedule[0], second + schedule[1]
    for group in range(5):
        for by in ROTATIONS[group % 2]:
            x = x + y
            y = _rotate_left(y, by) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + (group + 1)
    return x, y


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
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"a dropout rate must be in [0, 1), got {rate}")
    counter = _as_int32(torch.arange(length * channels, device=rows.device)).view(1, length, channels)
    first = rows.to(torch.int32)[:, None, None].expand(-1, length, channels)
    word, _ = threefry_2x32(key.to(rows.device), first, counter.expand_as(first))
    # Flipping the sign bit orders signed integers as unsigned ones.
    return (word ^ -SIGN) >= threshold(rate) - SIGN
