"""Draws by Gumbel noise in plain torch: words held by 64-bit integers."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int

from jaxsloth.kernels.dropout.torch_ops import MASK, philox_4x32
from jaxsloth.kernels.gumbel.contract import DOMAIN, MOST, SERIES, SERIES_BELOW, share_of


def noise(
    ids: Int[torch.Tensor, "batch n"] | None,
    keys: Int[torch.Tensor, "batch 2"],
    rows: Int[torch.Tensor, " batch"],
    positions: Int[torch.Tensor, " batch"],
    *,
    vocab: int,
) -> Float32[torch.Tensor, "batch n"]:
    """What is added to the scores. keys: words in 0..2**32 - 1, int64."""
    share = share_of(vocab)
    if ids is not None and ids.shape[1] > share:  # a word serves four tokens
        return noise(None, keys, rows, positions, vocab=vocab).gather(1, ids.long())
    place = torch.arange(share, device=rows.device)[None] if ids is None else ids.long() % share
    k0, k1 = keys.long().unsqueeze(-1).unbind(1)
    row, position = rows.long()[:, None] & MASK, positions.long()[:, None] & MASK
    words = philox_4x32(torch.stack([k0, k1]), (place, position, row, torch.full_like(row, DOMAIN)))
    words = tuple(word.expand(rows.shape[0], place.shape[1]) for word in words)
    if ids is None:
        word = torch.cat(words, dim=1)[:, :vocab]
    else:
        word = torch.stack(words, dim=-1).gather(-1, (ids.long() // share)[..., None])[..., 0]
    return noise_of(word)


def noise_of(word: Int[torch.Tensor, "..."]) -> Float32[torch.Tensor, "..."]:
    """Of words in 0..2**32 - 1."""
    v = ((word.float() + 0.5) * 2.0**-32).clamp(max=MOST)
    series = torch.full_like(v, SERIES[-1])
    for factor in SERIES[-2::-1]:
        series = series * v + factor
    return -torch.log(torch.where(v < SERIES_BELOW, series * v, -torch.log(1.0 - v)))


@torch.no_grad()
def draw(
    scores: Float32[torch.Tensor, "batch n"],
    ids: Int[torch.Tensor, "batch n"] | None,
    keys: Int[torch.Tensor, "batch 2"],
    rows: Int[torch.Tensor, " batch"],
    positions: Int[torch.Tensor, " batch"],
    *,
    vocab: int,
) -> Int[torch.Tensor, " batch"]:
    """See the contract. keys: int64."""
    return (scores + noise(ids, keys, rows, positions, vocab=vocab)).argmax(dim=1)
