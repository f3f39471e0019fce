"""NEFTune's noise in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int, Int32, Int64

from jaxsloth.kernels.embedding_noise.contract import PARITY, ROTATIONS

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
def embedding_noise(
    key: Int[torch.Tensor, "2"],
    rows: Int[torch.Tensor, " batch"],
    segments: Int[torch.Tensor, "batch length"],
    channels: int,
    *,
    alpha: float,
) -> Float32[torch.Tensor, "batch length channels"]:
    """What is to be added to the embeddings; see the contract. key: two words in 0..2**32 - 1, int64."""
    batch, length = segments.shape
    counts = torch.zeros(batch, length + 1, dtype=torch.float32, device=segments.device)
    documents = segments.long()
    counts.scatter_add_(1, documents, torch.ones_like(documents, dtype=torch.float32))
    magnitude = (alpha / (counts.gather(1, documents) * channels).sqrt()).masked_fill_(documents == 0, 0.0)
    second = torch.arange(length * channels, dtype=torch.int32, device=segments.device).view(1, length, channels)
    first = rows.to(torch.int32)[:, None, None].expand(batch, length, channels)
    word, _ = threefry_2x32(key.to(segments.device), first, second.expand_as(first))
    # The right shift of a signed integer copies its sign; the mask takes the copies away.
    uniform = ((word >> 8) & 0xFFFFFF).float().mul_(2.0**-23).sub_(1.0)
    return uniform.mul_(magnitude[..., None])
