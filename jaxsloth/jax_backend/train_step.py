"""A train step over a whole accumulation window, and the evaluation step: one compiled function each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.backend import PLAIN, OptimizerOptions, Regularization, StepResult
from jaxsloth.batch import Batch, Window
from jaxsloth.jax_backend import placement
from jaxsloth.jax_backend.optimizer import OptimizerState
from jaxsloth.jax_backend.optimizer_8bit import make_optimizer
from jaxsloth.jax_backend.plan import Plan, documents_from, make_plan
from jaxsloth.jax_backend.run import DropoutKey
from jaxsloth.jax_backend.state import ModelState
from jaxsloth.kernels.dropout.contract import module_word, step_words
from jaxsloth.kernels.embedding_noise.xla_ops import embedding_noise
from jaxsloth.models.names import EMBEDDING, trainable_shapes


def summed_loss(
    structure: Any,
    trained: Any,
    frozen: Any,
    frequencies: Any,
    batch: Any,
    words: Any,
    plan: Plan,
    regularization: Regularization = PLAIN,
) -> Any:
    """The cross-entropy summed over a batch's targets.

    frequencies: (rotary settings, their frequencies). batch: (input_ids, targets, segments, positions, rows, and the arrays of
    its documents where it is packed). words: the step's key.
    """
    return _loss(structure, trained, frozen, frequencies, batch, words, plan, False, regularization)


def row_losses(
    structure: Any,
    trained: Any,
    frozen: Any,
    frequencies: Any,
    batch: Any,
    words: Any,
    plan: Plan,
    regularization: Regularization = PLAIN,
) -> Any:
    """The same, summed by row: float32 ``[rows]``."""
    return _loss(structure, trained, frozen, frequencies, batch, words, plan, True, regularization).sum(axis=1)


def _loss(
    structure: Any,
    trained: Any,
    frozen: Any,
    frequencies: Any,
    batch: Any,
    words: Any,
    plan: Plan,
    per_token: bool,
    regularization: Regularization,
) -> Any:
    input_ids, targets, segments, positions, rows, *documents = batch
    decoder = nnx.merge(structure, trained, frozen)
    added, alpha = None, regularization.embedding_noise
    if alpha:
        key = jnp.stack([words[0] ^ jnp.uint32(module_word(EMBEDDING)), words[1]])
        added = embedding_noise(key, rows, segments, decoder.spec.hidden, alpha=alpha)
    dropout = None if words is None else DropoutKey(words, rows)
    run = decoder.run(positions, segments, *frequencies, dropout=dropout, documents=documents_from(tuple(documents)))
    return decoder.loss(input_ids, run, targets, plan, added, per_token, regularization.label_smoothing)


class WindowStep(ABC):
    """One optimizer step, compiled once a shape: a scan over micro-batches, one sum over devices, one update."""

    def __init__(self, model: ModelState, options: OptimizerOptions) -> None:
        self._model, self._optimizer = model, make_optimizer(options, model.options.implementations)
        self._state: OptimizerState = placement.replicate(self._optimizer.init(model.trained))
        self._run = jax.jit(self._step, static_argnames=("ropes", "plan"), donate_argnums=(0, 1))
        self._frozen: Any = None

    def freeze(self, names: Collection[str]) -> None:
        shapes = trainable_shapes(self._model.spec)
        masks = {name: np.full((1,) * len(shape), name in names, np.float32) for name, shape in shapes.items()}
        self._frozen = self._model.stack(masks) if names else None

    @abstractmethod
    def _total(self, trained: Any, frozen: Any, rates: Any, batch: Any, words: Any, plan: Plan) -> tuple[Any, Any]:
        """(what is descended, summed over a device's micro-batch; what else a step wants to know: arrays by row, or None)."""

    def _step(
        self,
        trained: Any,
        state: OptimizerState,
        frozen: Any,
        frequencies: Any,
        scalars: Any,
        window: Any,
        kept: Any,
        ropes: Any,
        plan: Plan,
    ) -> tuple[Any, OptimizerState, tuple[Any, Any, Any, Any], Any]:
        def share(trained: Any, frozen: Any, frequencies: Any, scalars: Any, scale: Any, *window: Any) -> Any:
            rates = (ropes, frequencies)

            def micro(total: Any, batch: Any) -> tuple[Any, Any]:
                def scaled(trained: Any) -> Any:
                    loss, known = self._total(trained, frozen, rates, batch, scalars["words"], plan)
                    loss = loss / scalars["count"]
                    return loss * scale, (loss, known)

                (_, (loss, known)), gradients = jax.value_and_grad(scaled, has_aux=True)(trained)
                return jax.tree.map(jnp.add, total, (loss, gradients)), known

            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
            if window[0].shape[0] == 1:
                total, known = micro(zeros, jax.tree.map(lambda array: array[0], window))
                known = jax.tree.map(lambda array: array[None], known)
            else:
                total, known = jax.lax.scan(micro, zeros, window)
            return placement.sum_over_devices(total), placement.gather_from_devices(known, axis=1)

        run = placement.over_devices(share, replicated=5, sharded_axis=1)
        (loss, gradients), known = run(trained, frozen, frequencies, scalars, state.loss_scale, *window)
        trained, state, norm, skipped = self._optimizer.step(trained, state, gradients, scalars["rate"], kept)
        together = jnp.stack([loss, norm, skipped.astype(jnp.float32)])
        return trained, state, (loss, norm, skipped, together), known

    def _advance(
        self, window: Window, count: int, more: tuple[np.ndarray, ...], learning_rate: float, step: int, seed: int
    ) -> tuple[tuple[Any, Any, Any, Any], Any]:
        """(the fields of a `StepResult`, what else `_total` tells ``[micro, rows]``).

        count: what the loss is divided by. more: arrays ``[micro, rows, …]`` that `_total`'s batch has behind its own.
        """
        model = self._model
        scalars = {
            "rate": np.float32(learning_rate),
            "count": np.float32(max(count, 1)),
            "words": np.array(step_words(seed, step), np.uint32),
        }
        frequencies, ropes = model.frequencies(int(window.positions.max(initial=0)) + 1)
        plan, documents = make_plan(model.checkpointing, model.unrolled, window.targets, window.segments, model.devices)
        arrays = (window.input_ids, window.targets, window.segments, window.positions, window.rows, *documents, *more)
        put = tuple(placement.put_batch(array, 1) for array in arrays)
        with model.compiles():
            model.trained, self._state, result, known = self._run(
                model.trained, self._state, model.frozen, frequencies, scalars, put, self._frozen, ropes=ropes, plan=plan
            )
        return result, known

    def state(self) -> dict[str, np.ndarray]:
        adam, found = self._state.adam, {}
        for key, tree in self._optimizer.trees(adam).items():
            found |= {f"{name}.{key}": value for name, value in self._model.unstack(tree).items() if value.size}
        found["count"] = np.array(adam.count, np.int64)
        if self._optimizer.options.loss_scaling:
            found["loss_scale"] = np.array(self._state.loss_scale, np.float32)
            found["good_steps"] = np.array(self._state.good_steps, np.int64)
        return found

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        model, now = self._model, self._state
        self._optimizer.check(state)
        trees = {}
        for key, tree in self._optimizer.trees(now.adam).items():
            # A tensor that is kept in float32 has no maxima.
            kept = {name: state[f"{name}.{key}"] if value.size else value for name, value in model.unstack(tree).items()}
            trees[key] = model.stack(kept)
        adam = self._optimizer.with_trees(now.adam, int(state["count"]), trees)
        scale, good = now.loss_scale, now.good_steps
        if self._optimizer.options.loss_scaling:
            scale, good = jnp.float32(state.get("loss_scale", scale)), jnp.int32(state.get("good_steps", 0))
        self._state = placement.replicate(OptimizerState(adam, scale, good))


class TrainStep(WindowStep):
    """See `jaxsloth.backend.TrainStep`."""

    def __init__(self, model: ModelState, options: OptimizerOptions, regularization: Regularization) -> None:
        super().__init__(model, options)
        self._regularization = regularization

    def _total(self, trained: Any, frozen: Any, rates: Any, batch: Any, words: Any, plan: Plan) -> tuple[Any, Any]:
        return summed_loss(self._model.structure, trained, frozen, rates, batch, words, plan, self._regularization), None

    def __call__(self, window: Window, *, learning_rate: float, step: int, seed: int) -> StepResult:
        return StepResult(*self._advance(window, window.valid_tokens, (), learning_rate, step, seed)[0])


class RowLosses:
    """The cross-entropy of every row of a batch, over all devices, dropout off: float32 ``[rows]`` on each of them."""

    def __init__(self, model: ModelState, smoothing: float = 0.0) -> None:
        self._model, self._regularization = model, Regularization(label_smoothing=smoothing)

    def __call__(self, trained: Any, batch: Batch) -> Any:
        """trained: a state like the model's."""
        model = self._model
        frequencies, ropes = model.frequencies(int(batch.positions.max(initial=0)) + 1)
        kept_for = partial(model.checkpointing, learns=False)
        plan, documents = make_plan(kept_for, model.unrolled, batch.targets[None], batch.segments[None], model.devices)
        own = (array[0] for array in documents)
        arrays = (batch.input_ids, batch.targets, batch.segments, batch.positions, batch.rows, *own)
        put = tuple(placement.put_batch(array, 0) for array in arrays)
        compiled_in = {"structure": model.structure, "ropes": ropes, "plan": plan, "regularization": self._regularization}
        with model.compiles():
            return _rows_of_devices(trained, model.frozen, frequencies, put, **compiled_in)


# Not a method: trainers ask for a new step at every evaluation, and programs are kept by function.
@partial(jax.jit, static_argnames=("structure", "ropes", "plan", "regularization"))
def _rows_of_devices(
    trained: Any,
    frozen: Any,
    frequencies: Any,
    batch: Any,
    structure: Any,
    ropes: Any,
    plan: Plan,
    regularization: Regularization,
) -> Any:
    def share(trained: Any, frozen: Any, frequencies: Any, *batch: Any) -> Any:
        rates = (ropes, frequencies)
        losses = row_losses(structure, trained, frozen, rates, batch, None, plan, regularization)
        return placement.gather_from_devices(losses, axis=0)

    return placement.over_devices(share, replicated=3, sharded_axis=0)(trained, frozen, frequencies, *batch)


class EvalStep:
    def __init__(self, model: ModelState, smoothing: float) -> None:
        self._model, self._rows = model, RowLosses(model, smoothing)

    def __call__(self, batch: Batch) -> tuple[Any, int]:
        return self._rows(self._model.trained, batch).sum(), batch.valid_tokens()


def make_train_step(model: ModelState, options: OptimizerOptions, regularization: Regularization) -> TrainStep:
    return TrainStep(model, options, regularization)


def make_eval_step(model: ModelState, smoothing: float) -> EvalStep:
    return EvalStep(model, smoothing)
