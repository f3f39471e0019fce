"""The head and its loss by their formula, in float64, with whole logits."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int


def linear_cross_entropy(
    hidden: Float64[torch.Tensor, "tokens width"],
    weight: Float64[torch.Tensor, "vocab width"],
    targets: Int[torch.Tensor, " tokens"],
    *,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    per_token: bool = False,
    label_smoothing: float = 0.0,
) -> Float64[torch.Tensor, "*tokens"]:
    """``-log softmax(logits)`` at the target, or its mean by the smoothed distribution, of every token, 0 where its target is
    ignored; or the sum of them."""
    logits = torch.einsum("tw,vw->tv", hidden, weight)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    valid = targets != ignore_index
    chosen = torch.nn.functional.one_hot(targets.long().where(valid, 0), weight.shape[0]).bool()
    log_probabilities = torch.log_softmax(logits, dim=-1)
    wanted = (1.0 - label_smoothing) * chosen + label_smoothing / weight.shape[0]
    losses = -(log_probabilities * wanted * valid[:, None]).sum(dim=1)
    return losses if per_token else losses.sum()
