"""What a training step descends: a function of the losses of a batch's targets, and how the composed decoder forms those."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from jaxsloth.batch import IGNORE, Batch
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.layers import Context
from jaxsloth.torch_backend.placement import to_device

Tensors = dict[str, torch.Tensor]


class Objective(Hashable, Protocol):
    """What the losses of a micro-batch's targets are made into. Equal objectives may replay one CUDA graph, so all that changes
    from batch to batch is in tensors on the device; "factor" (float32 scalar) is what the gradients are to be times."""

    @property
    def smoothing(self) -> float:
        """The label smoothing of the losses."""
        ...

    def weigh(
        self, losses: torch.Tensor, chosen: torch.Tensor, shape: tuple[int, int], tensors: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what a step wants to know, the gradient by every loss: float32, a scalar where all are equal).

        losses: float32 ``[n]``, of the targets at `chosen`, indices into the flat batch of `shape` (rows, length); where those
        are filled up with rows·length the losses are 0.
        """
        ...

    def add_gradients(self, decoder: Decoder, batch: Batch, words: torch.Tensor | None, tensors: Tensors) -> torch.Tensor:
        """What a step wants to know; the gradients are added to the trained tensors' by autograd."""
        ...


@dataclass(frozen=True)
class SummedLoss:
    """The sum of the losses: cross-entropy training."""

    smoothing: float = 0.0

    def weigh(
        self, losses: torch.Tensor, chosen: torch.Tensor, shape: tuple[int, int], tensors: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del chosen, shape
        return losses.sum(), tensors["factor"]

    def add_gradients(self, decoder: Decoder, batch: Batch, words: torch.Tensor | None, tensors: Tensors) -> torch.Tensor:
        loss = summed_loss(decoder, batch, words, tensors.get("noise"), self.smoothing)
        (loss * tensors["factor"]).backward()
        return loss.detach()


SUMMED = SummedLoss()


def by_row(losses: torch.Tensor, chosen: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Losses (as `Objective.weigh` has them) added up by row: float32 ``[rows]``, the same from run to run."""
    whole = losses.new_zeros(shape[0] * shape[1] + 1)
    whole.index_copy_(0, chosen, losses)
    return whole[:-1].view(shape).sum(dim=1)


def summed_loss(
    decoder: Decoder,
    batch: Batch,
    dropout_words: torch.Tensor | None,
    noise: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """The cross-entropy summed over the batch's targets, float32; differentiable by everything that is trained. noise: what is
    added to the embeddings, ``[batch, length, hidden]``."""
    return _loss(decoder, batch, dropout_words, per_token=False, smoothing=smoothing, noise=noise)[0]


def target_losses(
    decoder: Decoder, batch: Batch, dropout_words: torch.Tensor | None, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the cross-entropy of every target of the batch, differentiable; their indices into the flat batch)."""
    return _loss(decoder, batch, dropout_words, per_token=True, smoothing=smoothing)


def _loss(
    decoder: Decoder,
    batch: Batch,
    dropout_words: torch.Tensor | None,
    per_token: bool,
    smoothing: float,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    device = decoder.device
    # Found on the host: asking the device would wait for it.
    chosen = to_device(np.flatnonzero(batch.targets != IGNORE), device)
    context = replace(make_context(decoder, batch, dropout_words), noise=noise)
    ids, targets = to_device(batch.input_ids, device), to_device(batch.targets, device)
    return decoder.loss(ids, context, targets, chosen, per_token, smoothing), chosen


def make_context(decoder: Decoder, batch: Batch, dropout_words: torch.Tensor | None = None) -> Context:
    device = decoder.device
    tables = decoder.rope_tables(to_device(batch.positions, device), int(batch.positions.max(initial=0)) + 1)
    rows = to_device(batch.rows, device) if dropout_words is not None else None
    return Context(tables, to_device(batch.segments, device), rows=rows, dropout_words=dropout_words)
