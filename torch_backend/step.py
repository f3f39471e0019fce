"""A step over a whole accumulation step batch, the evaluation step, and the log-probs of rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch

from jaxsloth.backend import OptimizerOptions, StepResult
from jaxsloth.batch import Batch, StepBatch
from jaxsloth.kernels.dropout.contract import module_key, step_key
from jaxsloth.kernels.embedding_noise.torch_ops import embedding_noise
from jaxsloth.models.names import EMBEDDING, check_base_is_whole
from jaxsloth.objectives.objective import Objective, RowObjective
from jaxsloth.torch_backend import autograd_pass, devices
from jaxsloth.torch_backend.devices import to_device
from jaxsloth.torch_backend.objective import Tensors, by_row
from jaxsloth.torch_backend.optimizer_8bit import make_optimizer
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


class Step:
    """See `jaxsloth.backend.Step`. Gradients of all micro-batches are summed in the flat buffer, reduced and applied once."""

    def __init__(self, model: ModelState, objective: Objective, options: OptimizerOptions) -> None:
        self._model, self._objective = model, objective
        self._optimizer = make_optimizer(model.flat(), options, model.options.implementations)
        self._drops = model.spec.lora is not None and model.spec.lora.dropout > 0
        self._program = model.written_program()

    def __call__(self, step_batch: StepBatch, *, learning_rate: float, step: int, seed: int) -> StepResult:
        objective, device = self._objective, self._model.decoder.device
        count, values = objective.prepare(step_batch, devices.world_size())
        mine = devices.share(step_batch.input_ids.shape[1])
        arrays = {name: to_device(value[:, mine], device) for name, value in values.items()}
        factor = torch.full((), self._optimizer.loss_scale / count, dtype=torch.float32, device=device)
        total, log_probs = torch.zeros_like(factor), None
        if isinstance(objective, RowObjective):
            log_probs = torch.zeros(step_batch.rows.shape, dtype=torch.float32, device=device)
        for micro, result in self._passes(step_batch, factor, arrays, step, seed):
            if log_probs is None:
                total += result / count
            else:
                log_probs[micro, mine] = result
        if isinstance(objective, RowObjective) and log_probs is not None:
            flat = {name: value.flatten() for name, value in arrays.items()}
            total = objective.losses_and_grads(torch, log_probs[:, mine].flatten(), flat)[0].sum() / count
            devices.sum_over_processes(log_probs)
        return StepResult(*self._update(learning_rate, total), log_probs)

    def _passes(
        self, step_batch: StepBatch, factor: torch.Tensor, arrays: Tensors, step: int, seed: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Adds up the gradients of this process' rows: (micro-batch, what the objective makes of it, good until the next)."""
        model = self._model
        self._optimizer.flat.gradient.zero_()
        rng_key = torch.tensor(step_key(seed, step), device=factor.device) if self._drops else None
        mine = devices.share(step_batch.input_ids.shape[1])
        if self._program is not None:
            self._program.begin((mine.stop - mine.start) * step_batch.input_ids.shape[2])
        for micro in range(step_batch.input_ids.shape[0]):
            batch = step_batch.micro(micro).take(mine)
            tensors = {"factor": factor} | {name: array[micro] for name, array in arrays.items()}
            if self._objective.noise:
                tensors["noise"] = self._noise(batch, seed, step)
            if self._program is not None:
                inputs = tensors if rng_key is None else tensors | {"rng_key": rng_key}
                yield micro, self._program.add_gradients(batch, self._objective, inputs)
            else:
                yield micro, autograd_pass.add_gradients(model.decoder, batch, self._objective, rng_key, tensors)

    def _noise(self, batch: Batch, seed: int, step: int) -> torch.Tensor:
        """The noise on the embeddings."""
        device = self._model.decoder.device
        rows, segments = to_device(batch.rows, device), to_device(batch.segments, device)
        key = torch.tensor(module_key(seed, step, EMBEDDING), device=device)
        return embedding_noise(key, rows, segments, self._model.spec.hidden, alpha=self._objective.noise)

    def _update(self, learning_rate: float, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool, OnHost]:
        """Applies the gradients and sums `total`, this process' part of the loss, over all: the first fields of a
        `StepResult`."""
        grad_norm, skipped = self._optimizer.step(learning_rate, total)
        return total, grad_norm, skipped, OnHost(torch.stack([total, grad_norm, torch.full_like(total, float(skipped))]))

    def state(self) -> dict[str, np.ndarray]:
        return self._optimizer.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._optimizer.load_state(state)

    def freeze(self, names: Collection[str]) -> None:
        self._optimizer.freeze(names)


class EvalStep:
    def __init__(self, model: ModelState, smoothing: float) -> None:
        self._rows = RowLosses(model, smoothing)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, int]:
        total = self._rows(batch)[0].sum()
        devices.sum_over_processes(total)
        return total, batch.valid_tokens()


class RowLosses:
    """The cross-entropy of this process' rows of a batch, dropout off: (float32 ``[its rows]``, which they are)."""

    def __init__(self, model: ModelState, smoothing: float = 0.0) -> None:
        self._model, self._smoothing = model, smoothing
        self._program = model.written_program() if model.spec.lora is not None else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[torch.Tensor, slice]:
        mine = devices.share(batch.input_ids.shape[0])
        own = batch.take(mine)
        if self._program is None:
            return by_row(
                *autograd_pass.losses(self._model.decoder, own, None, smoothing=self._smoothing), own.input_ids.shape
            ), mine
        self._program.begin(0)
        return self._program.row_losses(own, self._smoothing), mine


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
        devices.sum_over_processes(whole)
        return whole.cpu().numpy()

    return row_log_probs
