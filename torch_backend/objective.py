"""What an objective makes of a micro-batch's losses, and their gradient."""

from __future__ import annotations

import torch

from jaxsloth.objectives.objective import Objective, RowObjective

Tensors = dict[str, torch.Tensor]


def weigh(
    objective: Objective, losses: torch.Tensor, target_positions: torch.Tensor, shape: tuple[int, int], tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the losses' sum, or the rows' log-probs where the objective is of rows; the gradient by every loss: float32, a scalar
    where all have the same).

    losses: float32 ``[n]``, of the targets at `target_positions`, indices into the flat batch of `shape` (rows, length); where
    those are filled up with rows·length the losses are 0. tensors: the objective's arrays, and "factor" (float32 scalar), what
    the gradients are to be times.
    """
    if not isinstance(objective, RowObjective):
        return losses.sum(), tensors["factor"]
    log_probs = -by_row(losses, target_positions, shape)
    _, grads = objective.losses_and_grads(torch, log_probs, tensors)
    row = (target_positions // shape[1]).clamp(max=shape[0] - 1)
    return log_probs, (grads * -tensors["factor"]).index_select(0, row)


def by_row(losses: torch.Tensor, target_positions: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Losses (as `weigh` has them) added up by row: float32 ``[rows]``, the same from run to run."""
    whole = losses.new_zeros(shape[0] * shape[1] + 1)
    whole.index_copy_(0, target_positions, losses)
    return whole[:-1].view(shape).sum(dim=1)
