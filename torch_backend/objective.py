"""The objective of a training step: a function of the losses of a batch's targets."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

Tensors = dict[str, torch.Tensor]


class Objective(Hashable, Protocol):
    """A function of a micro-batch's losses. Equal objectives may replay one CUDA graph, so all that changes from batch to batch
    is in tensors on the device; "factor" (float32 scalar) is what the gradients are to be times."""

    uniform: ClassVar[bool]  # every loss has the same gradient: a scalar, which does not depend on the losses

    @property
    def smoothing(self) -> float:
        """The label smoothing of the losses."""
        ...

    def weigh(
        self, losses: torch.Tensor, target_positions: torch.Tensor, shape: tuple[int, int], tensors: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the result that a step wants to know, the gradient by every loss: float32, a scalar where they are uniform).

        losses: float32 ``[n]``, of the targets at `target_positions`, indices into the flat batch of `shape` (rows, length);
        where those are filled up with rows·length the losses are 0.
        """
        ...


@dataclass(frozen=True)
class SummedLoss:
    """The sum of the losses: cross-entropy training."""

    smoothing: float = 0.0
    uniform: ClassVar[bool] = True

    def weigh(
        self, losses: torch.Tensor, target_positions: torch.Tensor, shape: tuple[int, int], tensors: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del target_positions, shape
        return losses.sum(), tensors["factor"]


SUMMED = SummedLoss()


def by_row(losses: torch.Tensor, target_positions: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Losses (as `Objective.weigh` has them) added up by row: float32 ``[rows]``, the same from run to run."""
    whole = losses.new_zeros(shape[0] * shape[1] + 1)
    whole.index_copy_(0, target_positions, losses)
    return whole[:-1].view(shape).sum(dim=1)
