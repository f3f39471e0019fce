"""LoRA's A behind a dropout by its formula, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64

from jaxsloth.kernels.dropout.contract import kept_scale
from jaxsloth.kernels.dropout.reference import keep_mask


def lora_dropout(
    x: Float64[torch.Tensor, "tokens in"],
    a: Float64[torch.Tensor, "rank in"],
    *,
    key: tuple[int, int],
    modules: Sequence[int],
    ranks: Sequence[int],
    rows: Sequence[int],
    length: int,
    rate: float,
    first: int = 0,
) -> Float64[torch.Tensor, "tokens rank"]:
    """``drop_m(x)·A_mᵀ`` of every module m, side by side; key and modules: the words of `Masks`, as Python integers."""
    parts = []
    for word, own in zip(modules, a.split(list(ranks)), strict=True):
        keep = keep_mask((key[0] ^ word, key[1]), rows, length, x.shape[1], rate=rate).reshape(-1, x.shape[1])[first:]
        parts.append((x * torch.from_numpy(keep).to(x.device) * kept_scale(rate)) @ own.T)
    return torch.cat(parts, dim=1)
