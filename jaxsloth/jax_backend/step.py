"""A step over a whole accumulation step batch, the evaluation step, and the log-probs of rows: one compiled function each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.backend import OptimizerOptions, StepResult
from jaxsloth.batch import FIELDS, Batch, StepBatch
from jaxsloth.jax_backend import devices
from jaxsloth.jax_backend.optimizer import OptimizerState
from jaxsloth.jax_backend.optimizer_8bit import make_optimizer
from jaxsloth.jax_backend.plan import ProgramPlan, documents_from, make_plan
from jaxsloth.jax_backend.run import DropoutKey
from jaxsloth.jax_backend.state import ModelState
from jaxsloth.kernels.dropout.contract import module_word, step_key
from jaxsloth.kernels.embedding_noise.xla_ops import embedding_noise
from jaxsloth.models.names import EMBEDDING, check_base_is_whole, trainable_shapes
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.objectives.objective import Objective, RowObjective


def summed_loss(
    structure: Any,
    trained: Any,
    frozen: Any,
    rope_frequencies: Any,
    batch: Any,
    rng_key: Any,
    plan: ProgramPlan,
    objective: Objective,
    by_row: bool = False,
) -> Any:
    """The cross-entropy summed over a batch's targets, float32; or by row, ``[rows]``.

    rope_frequencies: (rotary settings, their frequencies). batch: (input_ids, targets, segments, positions, rows, and the
    arrays of its documents where it is packed). rng_key: the step's key.
    """
    input_ids, targets, segments, positions, rows, *documents = batch
    decoder = nnx.merge(structure, trained, frozen)
    added, alpha = None, objective.noise
    if alpha:
        key = jnp.stack([rng_key[0] ^ jnp.uint32(module_word(EMBEDDING)), rng_key[1]])
        added = embedding_noise(key, rows, segments, decoder.spec.hidden, alpha=alpha)
    dropout = None if rng_key is None else DropoutKey(rng_key, rows)
    run = decoder.run(positions, segments, *rope_frequencies, dropout=dropout, documents=documents_from(tuple(documents)))
    loss = decoder.loss(input_ids, run, targets, plan, added, by_row, objective.smoothing)
    return loss.sum(axis=1) if by_row else loss


row_losses = partial(summed_loss, by_row=True)


class Step:
    """See `jaxsloth.backend.Step`. It is compiled once a shape: a scan over micro-batches, one sum over devices, one update."""

    def __init__(self, model: ModelState, objective: Objective, options: OptimizerOptions) -> None:
        self._model, self._objective = model, objective
        self._optimizer = make_optimizer(options, model.options.implementations)
        self._state: OptimizerState = devices.replicate(self._optimizer.init(model.trained))
        self._run = jax.jit(self._step, static_argnames=("ropes", "plan"), donate_argnums=(0, 1))
        self._frozen: Any = None

    def freeze(self, names: Collection[str]) -> None:
        shapes = trainable_shapes(self._model.spec)
        masks = {name: np.full((1,) * len(shape), name in names, np.float32) for name, shape in shapes.items()}
        self._frozen = self._model.stack(masks) if names else None

    def _total(
        self, trained: Any, frozen: Any, rope_frequencies: Any, batch: Any, values: Any, rng_key: Any, plan: ProgramPlan
    ) -> tuple[Any, Any]:
        """(the losses summed over a device's micro-batch, the rows' log-probs where the objective is of them)."""
        arguments = (self._model.structure, trained, frozen, rope_frequencies, batch, rng_key, plan, self._objective)
        if not isinstance(self._objective, RowObjective):
            return summed_loss(*arguments), None
        log_probs = -row_losses(*arguments)
        return self._objective.losses_and_grads(jnp, log_probs, values)[0].sum(), log_probs

    def _step(
        self,
        trained: Any,
        state: OptimizerState,
        frozen: Any,
        frequencies: Any,
        scalars: Any,
        step_batch: Any,
        kept: Any,
        ropes: Any,
        plan: ProgramPlan,
    ) -> tuple[Any, OptimizerState, tuple[Any, Any, Any, Any, Any]]:
        def per_device(trained: Any, frozen: Any, frequencies: Any, scalars: Any, scale: Any, *step_batch: Any) -> Any:
            rope_frequencies = (ropes, frequencies)

            def micro(total: Any, batch: Any) -> tuple[Any, Any]:
                *batch, values = batch

                def scaled(trained: Any) -> Any:
                    loss, log_probs = self._total(trained, frozen, rope_frequencies, batch, values, scalars["rng_key"], plan)
                    loss = loss / scalars["count"]
                    return loss * scale, (loss, log_probs)

                (_, (loss, log_probs)), gradients = jax.value_and_grad(scaled, has_aux=True)(trained)
                return jax.tree.map(jnp.add, total, (loss, gradients)), log_probs

            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
            if step_batch[0].shape[0] == 1:
                total, log_probs = micro(zeros, jax.tree.map(lambda array: array[0], step_batch))
                log_probs = jax.tree.map(lambda array: array[None], log_probs)
            else:
                total, log_probs = jax.lax.scan(micro, zeros, step_batch)
            return devices.sum_over_devices(total), devices.gather_from_devices(log_probs, axis=1)

        run = devices.over_devices(per_device, replicated=5, sharded_axis=1)
        (loss, gradients), log_probs = run(trained, frozen, frequencies, scalars, state.loss_scale, *step_batch)
        trained, state, norm, skipped = self._optimizer.step(trained, state, gradients, scalars["rate"], kept)
        stacked = jnp.stack([loss, norm, skipped.astype(jnp.float32)])
        return trained, state, (loss, norm, skipped, stacked, log_probs)

    def __call__(self, step_batch: StepBatch, *, learning_rate: float, step: int, seed: int) -> StepResult:
        model = self._model
        count, values = self._objective.prepare(step_batch, model.devices)
        scalars = {
            "rate": np.float32(learning_rate),
            "count": np.float32(count),
            "rng_key": np.array(step_key(seed, step), np.uint32),
        }
        frequencies, ropes = model.frequencies(int(step_batch.positions.max(initial=0)) + 1)
        plan, documents = make_plan(model.checkpointing, model.unrolled, step_batch.targets, step_batch.segments, model.devices)
        batch = tuple(getattr(step_batch, name) for name in FIELDS)
        put = jax.tree.map(partial(devices.put_batch, axis=1), (*batch, *documents, values))
        with model.compiles():
            model.trained, self._state, result = self._run(
                model.trained, self._state, model.frozen, frequencies, scalars, put, self._frozen, ropes=ropes, plan=plan
            )
        return StepResult(*result)

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
        self._state = devices.replicate(OptimizerState(adam, scale, good))


class RowLosses:
    """The cross-entropy of every row of a batch, over all devices, dropout off: float32 ``[rows]`` on each of them."""

    def __init__(self, model: ModelState, smoothing: float = 0.0) -> None:
        self._model, self._objective = model, CausalLoss(label_smoothing=smoothing)

    def __call__(self, trained: Any, batch: Batch) -> Any:
        """trained: a state like the model's."""
        model = self._model
        frequencies, ropes = model.frequencies(int(batch.positions.max(initial=0)) + 1)
        kept_for = partial(model.checkpointing, learns=False)
        plan, documents = make_plan(kept_for, model.unrolled, batch.targets[None], batch.segments[None], model.devices)
        own = (array[0] for array in documents)
        arrays = (*(getattr(batch, name) for name in FIELDS), *own)
        put = tuple(devices.put_batch(array, 0) for array in arrays)
        compiled_in = {"structure": model.structure, "ropes": ropes, "plan": plan, "objective": self._objective}
        with model.compiles():
            return _rows_of_devices(trained, model.frozen, frequencies, put, **compiled_in)


# Not a method: trainers ask for a new step at every evaluation, and programs are kept by function.
@partial(jax.jit, static_argnames=("structure", "ropes", "plan", "objective"))
def _rows_of_devices(
    trained: Any,
    frozen: Any,
    frequencies: Any,
    batch: Any,
    structure: Any,
    ropes: Any,
    plan: ProgramPlan,
    objective: Objective,
) -> Any:
    def per_device(trained: Any, frozen: Any, frequencies: Any, *batch: Any) -> Any:
        rope_frequencies = (ropes, frequencies)
        losses = row_losses(structure, trained, frozen, rope_frequencies, batch, None, plan, objective)
        return devices.gather_from_devices(losses, axis=0)

    return devices.over_devices(per_device, replicated=3, sharded_axis=0)(trained, frozen, frequencies, *batch)


class EvalStep:
    def __init__(self, model: ModelState, smoothing: float) -> None:
        self._model, self._rows = model, RowLosses(model, smoothing)

    def __call__(self, batch: Batch) -> tuple[Any, int]:
        return self._rows(self._model.trained, batch).sum(), batch.valid_tokens()


def make_row_log_probs(model: ModelState, adapters: bool) -> Callable[[Batch], np.ndarray]:
    """See `jaxsloth.backend.Model.row_log_probs`."""
    rows, off = RowLosses(model), None
    if not adapters:
        check_base_is_whole(model.spec)
        off = devices.replicate(jax.tree.map(jnp.zeros_like, model.trained))  # the same program: adapters of zeros

    def row_log_probs(batch: Batch) -> np.ndarray:
        return -np.asarray(rows(model.trained if off is None else off, batch))

    return row_log_probs
