"""Training on pairs of answers, one better than the other: the loss of a pair, its step, and the log-probs of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsloth.backend import OptimizerOptions, PreferenceOptions, PreferenceResult
from jaxsloth.batch import IGNORE, Batch, Window, check_reference, pairs_of
from jaxsloth.jax_backend import placement
from jaxsloth.jax_backend.plan import Plan
from jaxsloth.jax_backend.state import ModelState
from jaxsloth.jax_backend.train_step import RowLosses, WindowStep, row_losses
from jaxsloth.models.names import check_base_is_whole


def pair_losses(options: PreferenceOptions, log_probs: Any, reference: Any, counts: Any) -> Any:
    """Every pair's loss ``[rows / 2]``, 0 where a pair has no target; all arguments are float32 ``[rows]``."""
    real = counts.reshape(-1, 2).sum(axis=1) > 0
    ratios = log_probs - reference
    if options.loss == "ipo":
        ratios = ratios / jnp.maximum(counts, 1.0)
    chosen, rejected = ratios.reshape(-1, 2).T
    # A reference of rows that fill the shape may be anything: kept out before the loss, so that no gradient sees it.
    delta = jnp.where(real, chosen - rejected, 0.0)
    beta, smoothing = options.beta, options.label_smoothing
    if options.loss == "sigmoid":
        losses = -(1.0 - smoothing) * jax.nn.log_sigmoid(beta * delta) - smoothing * jax.nn.log_sigmoid(-beta * delta)
    elif options.loss == "hinge":
        losses = jax.nn.relu(1.0 - beta * delta)
    else:
        losses = (delta - 1.0 / (2.0 * beta)) ** 2
    return jnp.where(real, losses, 0.0)


class PreferenceStep(WindowStep):
    """See `jaxsloth.backend.PreferenceStep`."""

    def __init__(self, model: ModelState, options: OptimizerOptions, preference: PreferenceOptions) -> None:
        super().__init__(model, options)
        self._preference = preference

    def _total(self, trained: Any, frozen: Any, rates: Any, batch: Any, words: Any, plan: Plan) -> tuple[Any, Any]:
        *batch, reference = batch
        log_probs = -row_losses(self._model.structure, trained, frozen, rates, batch, words, plan)
        counts = (batch[1] != IGNORE).sum(axis=1).astype(jnp.float32)
        return pair_losses(self._preference, log_probs, reference, counts).sum(), log_probs

    def __call__(
        self, window: Window, reference: np.ndarray, *, learning_rate: float, step: int, seed: int
    ) -> PreferenceResult:
        pairs, _ = pairs_of(window, self._model.devices)
        check_reference(window, reference)
        result, log_probs = self._advance(window, pairs, (reference.astype(np.float32),), learning_rate, step, seed)
        return PreferenceResult(*result, log_probs)


def make_row_log_probs(model: ModelState, adapters: bool) -> Callable[[Batch], np.ndarray]:
    """See `jaxsloth.backend.Model.row_log_probs`."""
    rows, off = RowLosses(model), None
    if not adapters:
        check_base_is_whole(model.spec)
        off = placement.replicate(jax.tree.map(jnp.zeros_like, model.trained))  # the same program: adapters of zeros

    def row_log_probs(batch: Batch) -> np.ndarray:
        return -np.asarray(rows(model.trained if off is None else off, batch))

    return row_log_probs
