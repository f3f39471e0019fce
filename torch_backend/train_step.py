"""A train step over a whole accumulation window, and the evaluation step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch

from jaxsloth.backend import OptimizerOptions, Regularization, StepResult
from jaxsloth.batch import Batch, Window
from jaxsloth.kernels.dropout.contract import key_words, step_words
from jaxsloth.kernels.embedding_noise.torch_ops import embedding_noise
from jaxsloth.models.names import EMBEDDING
from jaxsloth.torch_backend import autograd_pass, placement
from jaxsloth.torch_backend.objective import Objective, SummedLoss, Tensors, by_row
from jaxsloth.torch_backend.optimizer_8bit import make_optimizer
from jaxsloth.torch_backend.placement import to_device
from jaxsloth.torch_backend.state import ModelState


class OnHost:
    """Values on their way to the host. Reading them waits for what made them, and not for what was launched since, as reading
    a tensor of the GPU does."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def block_until_ready(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()

    def tolist(self) -> list[float]:
        self.block_until_ready()
        return self._values.tolist()


class WindowStep:
    """One optimizer step: every micro-batch's gradients are summed in the flat buffer, then reduced and applied once."""

    def __init__(self, model: ModelState, options: OptimizerOptions, objective: Objective) -> None:
        self._model, self._objective = model, objective
        self._optimizer = make_optimizer(model.flat(), options, model.options.implementations)
        self._drops = model.spec.lora is not None and model.spec.lora.dropout > 0
        self._program = model.written_program()

    def _passes(
        self, window: Window, tensors_of: Callable[[int], Tensors], step: int, seed: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Adds up the gradients of this process' rows: (micro-batch, what the objective makes of it, good until the next)."""
        model, device = self._model, self._model.decoder.device
        self._optimizer.flat.gradient.zero_()
        words = torch.tensor(step_words(seed, step), device=device) if self._drops else None
        mine = placement.share(window.input_ids.shape[1])
        if self._program is not None:
            self._program.begin((mine.stop - mine.start) * window.input_ids.shape[2])
        for micro in range(window.input_ids.shape[0]):
            batch = Batch(
                window.input_ids[micro, mine],
                window.targets[micro, mine],
                window.segments[micro, mine],
                window.positions[micro, mine],
                window.rows[micro, mine],
            )
            if self._program is not None:
                inputs = tensors_of(micro) if words is None else tensors_of(micro) | {"dropout_words": words}
                yield micro, self._program.add_gradients(batch, self._objective, inputs)
            else:
                yield (
                    micro,
                    autograd_pass.add_gradients(model.decoder, batch, self._objective, words, tensors_of(micro)),
                )

    def _factor(self, count: int) -> torch.Tensor:
        """The factor of the gradients of a mean over `count`."""
        return torch.full((), self._optimizer.loss_scale / count, dtype=torch.float32, device=self._model.decoder.device)

    def _update(self, learning_rate: float, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool, OnHost]:
        """Applies the gradients and sums `total`, this process' part of the loss, over all: the fields of a `StepResult`."""
        grad_norm, skipped = self._optimizer.step(learning_rate, total)
        return total, grad_norm, skipped, OnHost(torch.stack([total, grad_norm, torch.full_like(total, float(skipped))]))

    def state(self) -> dict[str, np.ndarray]:
        return self._optimizer.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._optimizer.load_state(state)

    def freeze(self, names: Collection[str]) -> None:
        self._optimizer.freeze(names)


class TrainStep(WindowStep):
    """See `jaxsloth.backend.TrainStep`."""

    def __init__(self, model: ModelState, options: OptimizerOptions, regularization: Regularization) -> None:
        super().__init__(model, options, SummedLoss(regularization.label_smoothing))
        self._alpha = regularization.embedding_noise

    def __call__(self, window: Window, *, learning_rate: float, step: int, seed: int) -> StepResult:
        count = max(window.valid_tokens, 1)
        tensors = {"factor": self._factor(count)}
        total = torch.zeros_like(tensors["factor"])

        def tensors_of(micro: int) -> Tensors:
            return tensors | {"noise": self._noise(window, micro, seed, step)} if self._alpha else tensors

        for _, loss in self._passes(window, tensors_of, step, seed):
            total += loss / count
        return StepResult(*self._update(learning_rate, total))

    def _noise(self, window: Window, micro: int, seed: int, step: int) -> torch.Tensor:
        """The noise on the embeddings of this process' rows."""
        device, mine = self._model.decoder.device, placement.share(window.input_ids.shape[1])
        rows, segments = to_device(window.rows[micro, mine], device), to_device(window.segments[micro, mine], device)
        key = torch.tensor(key_words(seed, step, EMBEDDING), device=device)
        return embedding_noise(key, rows, segments, self._model.spec.hidden, alpha=self._alpha)


class EvalStep:
    def __init__(self, model: ModelState, smoothing: float) -> None:
        self._rows = RowLosses(model, smoothing)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, int]:
        total = self._rows(batch)[0].sum()
        placement.sum_over_processes(total)
        return total, batch.valid_tokens()


class RowLosses:
    """The cross-entropy of this process' rows of a batch, dropout off: (float32 ``[its rows]``, which they are)."""

    def __init__(self, model: ModelState, smoothing: float = 0.0) -> None:
        self._model, self._smoothing = model, smoothing
        self._program = model.written_program() if model.spec.lora is not None else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[torch.Tensor, slice]:
        mine = placement.share(batch.input_ids.shape[0])
        own = Batch(batch.input_ids[mine], batch.targets[mine], batch.segments[mine], batch.positions[mine], batch.rows[mine])
        if self._program is None:
            return by_row(
                *autograd_pass.losses(self._model.decoder, own, None, smoothing=self._smoothing), own.input_ids.shape
            ), mine
        self._program.begin(0)
        return self._program.row_losses(own, self._smoothing), mine


def make_train_step(model: ModelState, options: OptimizerOptions, regularization: Regularization) -> TrainStep:
    return TrainStep(model, options, regularization)


def make_eval_step(model: ModelState, smoothing: float) -> EvalStep:
    return EvalStep(model, smoothing)
