"""NEFTune's noise in plain torch."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int

from jaxsloth.kernels.dropout.torch_ops import threefry_2x32


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
