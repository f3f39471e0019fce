"""Training on pairs of answers, one better than the other: the loss of a pair, its step, and the log-probs of rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from jaxsloth.backend import OptimizerOptions, PreferenceOptions, PreferenceResult
from jaxsloth.batch import Batch, Window, check_reference, pairs_of
from jaxsloth.models.names import check_base_is_whole
from jaxsloth.torch_backend import placement
from jaxsloth.torch_backend.objective import Tensors, by_row
from jaxsloth.torch_backend.placement import to_device
from jaxsloth.torch_backend.state import ModelState
from jaxsloth.torch_backend.train_step import RowLosses, WindowStep


@dataclass(frozen=True)
class PairLoss:
    """An `Objective` over rows 2i and 2i + 1; a step wants to know the rows' log-probs.

    Its tensors are float32 ``[rows]``: "reference", the reference's log-probs, and "counts", how many targets a row has.
    """

    options: PreferenceOptions
    uniform: ClassVar[bool] = False

    @property
    def smoothing(self) -> float:
        """Of the losses: none. A conservative pair loss smooths its own."""
        return 0.0

    def losses_and_grads(
        self, log_probs: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(every pair's loss ``[rows / 2]``, its gradient by the rows' log-probs ``[rows]``), 0 where a pair has no target."""
        beta, smoothing = self.options.beta, self.options.label_smoothing
        real = counts.view(-1, 2).sum(dim=1) > 0
        # The loss is of log-probs times these.
        scale = 1.0 / counts.clamp(min=1.0) if self.options.loss == "ipo" else torch.ones_like(counts)
        ratios = ((log_probs - reference) * scale).view(-1, 2)
        delta = (ratios[:, 0] - ratios[:, 1]).where(real, 0.0)  # a reference of rows that fill the shape may be anything
        if self.options.loss == "sigmoid":
            up, down = logsigmoid(beta * delta), logsigmoid(-beta * delta)
            losses = -(1.0 - smoothing) * up - smoothing * down
            grads = beta * (smoothing * up.exp() - (1.0 - smoothing) * down.exp())
        elif self.options.loss == "hinge":
            losses = torch.relu(1.0 - beta * delta)
            grads = -beta * (losses > 0)
        else:
            miss = delta - 1.0 / (2.0 * beta)
            losses, grads = miss * miss, 2.0 * miss
        grads = grads.where(real, 0.0)
        return losses.where(real, 0.0), torch.stack([grads, -grads], dim=1).view(-1) * scale

    def weigh(
        self, losses: torch.Tensor, target_positions: torch.Tensor, shape: tuple[int, int], tensors: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = -by_row(losses, target_positions, shape)
        _, grads = self.losses_and_grads(log_probs, tensors["reference"], tensors["counts"])
        row = (target_positions // shape[1]).clamp(max=shape[0] - 1)
        return log_probs, (grads * -tensors["factor"]).index_select(0, row)


class PreferenceStep(WindowStep):
    """See `jaxsloth.backend.PreferenceStep`."""

    def __init__(self, model: ModelState, options: OptimizerOptions, preference: PreferenceOptions) -> None:
        self._pair_loss = PairLoss(preference)
        super().__init__(model, options, self._pair_loss)

    def __call__(
        self, window: Window, reference: np.ndarray, *, learning_rate: float, step: int, seed: int
    ) -> PreferenceResult:
        pairs, counts = pairs_of(window, placement.world_size())
        check_reference(window, reference)
        count, device = max(pairs, 1), self._model.decoder.device
        mine = placement.share(window.input_ids.shape[1])
        whole = torch.zeros(counts.shape, dtype=torch.float32, device=device)
        factor = self._factor(count)
        scored, valued = to_device(counts[:, mine], device), to_device(reference[:, mine].astype(np.float32), device)

        def tensors_of(micro: int) -> Tensors:
            return {"factor": factor, "reference": valued[micro], "counts": scored[micro]}

        for micro, log_probs in self._passes(window, tensors_of, step, seed):
            whole[micro, mine] = log_probs
        losses, _ = self._pair_loss.losses_and_grads(whole[:, mine].flatten(), valued.flatten(), scored.flatten())
        placement.sum_over_processes(whole)
        return PreferenceResult(*self._update(learning_rate, losses.sum() / count), whole)


def make_row_log_probs(model: ModelState, adapters: bool) -> Callable[[Batch], np.ndarray]:
    """See `jaxsloth.backend.Model.row_log_probs`."""
    rows, flat = RowLosses(model), None
    if not adapters and model.spec.lora is not None:
        check_base_is_whole(model.spec)
        flat = model.flat()

    def row_log_probs(batch: Batch) -> np.ndarray:
        with nullcontext() if flat is None else flat.zeroed():
            losses, mine = rows(batch)
        whole = losses.new_zeros(batch.input_ids.shape[0])
        whole[mine] = -losses
        placement.sum_over_processes(whole)
        return whole.cpu().numpy()

    return row_log_probs
