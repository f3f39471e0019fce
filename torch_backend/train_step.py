"""A train step over a whole accumulation window, and the evaluation step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from jaxsloth.backend import OptimizerOptions, Regularization, StepResult
from jaxsloth.batch import IGNORE, Batch, Window
from jaxsloth.kernels.dropout.contract import key_words, step_words
from jaxsloth.kernels.embedding_noise.torch_ops import embedding_noise
from jaxsloth.models.names import EMBEDDING
from jaxsloth.torch_backend import placement
from jaxsloth.torch_backend.layers import Context
from jaxsloth.torch_backend.optimizer_8bit import make_optimizer
from jaxsloth.torch_backend.placement import to_device

if TYPE_CHECKING:
    from jaxsloth.torch_backend.model import TorchModel


class TrainStep:
    """One optimizer step: every micro-batch's gradients are summed in the flat buffer, then reduced and applied once."""

    def __init__(self, model: TorchModel, options: OptimizerOptions, regularization: Regularization) -> None:
        self._model, self._alpha = model, regularization.embedding_noise
        self._optimizer = make_optimizer(model.flat(), options, model.options.implementations)
        self._drops = model.spec.lora is not None and model.spec.lora.dropout > 0
        self._fast = model.fast_pass()

    def __call__(self, window: Window, *, learning_rate: float, step: int, seed: int) -> StepResult:
        optimizer, model = self._optimizer, self._model
        optimizer.flat.gradient.zero_()
        total = torch.zeros((), dtype=torch.float32, device=model.decoder.device)
        words = torch.tensor(step_words(seed, step), device=total.device) if self._drops else None
        count = max(window.valid_tokens, 1)
        mine = placement.share(window.input_ids.shape[1])
        factor = torch.full_like(total, optimizer.loss_scale / count)
        if self._fast is not None:
            self._fast.begin((mine.stop - mine.start) * window.input_ids.shape[2])
        for micro in range(window.input_ids.shape[0]):
            batch = Batch(
                window.input_ids[micro, mine],
                window.targets[micro, mine],
                window.segments[micro, mine],
                window.positions[micro, mine],
                window.rows[micro, mine],
            )
            noise = self._noise(batch, seed, step) if self._alpha else None
            if self._fast is not None:
                total += self._fast.add_gradients(batch, factor, noise) / count
                continue
            loss = summed_loss(model, batch, words, noise) / count
            (loss * optimizer.loss_scale).backward()
            total += loss.detach()
        grad_norm, skipped = optimizer.step(learning_rate, total)
        together = torch.stack([total, grad_norm, torch.full_like(total, float(skipped))])
        return StepResult(total, grad_norm, skipped, together)

    def _noise(self, batch: Batch, seed: int, step: int) -> torch.Tensor:
        device = self._model.decoder.device
        key = torch.tensor(key_words(seed, step, EMBEDDING), device=device)
        rows, segments = to_device(batch.rows, device), to_device(batch.segments, device)
        return embedding_noise(key, rows, segments, self._model.spec.hidden, alpha=self._alpha)

    def state(self) -> dict[str, np.ndarray]:
        return self._optimizer.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._optimizer.load_state(state)


class EvalStep:
    def __init__(self, model: TorchModel) -> None:
        self._model = model
        self._fast = model.fast_pass() if model.spec.lora is not None else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[torch.Tensor, int]:
        mine = placement.share(batch.input_ids.shape[0])
        own = Batch(batch.input_ids[mine], batch.targets[mine], batch.segments[mine], batch.positions[mine], batch.rows[mine])
        if self._fast is not None:
            self._fast.begin(own.input_ids.size)
            total = self._fast.loss(own)
        else:
            total = summed_loss(self._model, own, None)
        placement.sum_over_processes(total)
        return total, batch.valid_tokens()


def make_train_step(model: TorchModel, options: OptimizerOptions, regularization: Regularization) -> TrainStep:
    return TrainStep(model, options, regularization)


def make_eval_step(model: TorchModel) -> EvalStep:
    return EvalStep(model)


def summed_loss(
    model: TorchModel, batch: Batch, dropout_words: torch.Tensor | None, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """The cross-entropy summed over the batch's targets, float32; differentiable by everything that is trained."""
    device = model.decoder.device
    chosen = np.flatnonzero(batch.targets != IGNORE)  # found on the host: asking the device would wait for it
    context = replace(make_context(model, batch, dropout_words), noise=noise)
    return model.decoder.loss(
        to_device(batch.input_ids, device), context, to_device(batch.targets, device), to_device(chosen, device)
    )


def make_context(model: TorchModel, batch: Batch, dropout_words: torch.Tensor | None = None) -> Context:
    device = model.decoder.device
    tables = model.decoder.rope_tables(to_device(batch.positions, device), int(batch.positions.max(initial=0)) + 1)
    rows = to_device(batch.rows, device) if dropout_words is not None else None
    return Context(tables, to_device(batch.segments, device), rows=rows, dropout_words=dropout_words)
