"""A built model of the JAX backend: names in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsloth.backend import OptimizerOptions
from jaxsloth.batch import Batch
from jaxsloth.jax_backend import devices
from jaxsloth.jax_backend.functional_model import FunctionalModel
from jaxsloth.jax_backend.generate import DecodeState
from jaxsloth.jax_backend.plan import ProgramPlan, make_plan
from jaxsloth.jax_backend.state import ModelState
from jaxsloth.jax_backend.step import EvalStep, Step, make_row_log_probs, summed_loss
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.objectives.objective import Objective


class JaxModel(ModelState):
    """See `jaxsloth.backend.Model`."""

    def functional(self) -> FunctionalModel:
        return FunctionalModel(self)

    def logits(self, batch: Batch) -> np.ndarray:
        frequencies, ropes = self.frequencies(int(batch.positions.max(initial=0)) + 1)
        arrays = (batch.input_ids, batch.segments, batch.positions)
        return np.asarray(_logits(self.trained, self.frozen, frequencies, arrays, structure=self.structure, ropes=ropes))

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        self._check_trained()
        frequencies, ropes = self.frequencies(int(batch.positions.max(initial=0)) + 1)
        plan, documents = make_plan(self.checkpointing, self.unrolled, batch.targets[None], batch.segments[None], 1)
        own = (array[0] for array in documents)
        arrays = (batch.input_ids, batch.targets, batch.segments, batch.positions, batch.rows, *own)
        count = np.float32(batch.valid_tokens())
        loss, gradients = _gradients(
            self.trained, self.frozen, frequencies, arrays, count, structure=self.structure, ropes=ropes, plan=plan
        )
        return float(loss), self.unstack(gradients)

    def step(self, objective: Objective, optimizer: OptimizerOptions) -> Step:
        self._check_trained()
        devices.check_one_process()
        return Step(self, objective, optimizer)

    def _check_trained(self) -> None:
        if self.spec.lora is None:
            raise ValueError("the model has no adapters to train; call add_adapters first")

    def eval_step(self, label_smoothing: float = 0.0) -> EvalStep:
        return EvalStep(self, label_smoothing)

    def row_log_probs(self, adapters: bool = True) -> Callable[[Batch], np.ndarray]:
        return make_row_log_probs(self, adapters)

    def start_decode(self, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> DecodeState:
        return DecodeState(self, input_ids, lengths, capacity)


@partial(jax.jit, static_argnames=("structure", "ropes"))
def _logits(trained: Any, frozen: Any, frequencies: Any, arrays: Any, structure: Any, ropes: Any) -> Any:
    input_ids, segments, positions = arrays
    decoder = nnx.merge(structure, trained, frozen)
    hidden, _ = decoder.hidden(input_ids, decoder.run(positions, segments, ropes, frequencies))
    return decoder.head().forward(hidden)


@partial(jax.jit, static_argnames=("structure", "ropes", "plan"))
def _gradients(
    trained: Any, frozen: Any, frequencies: Any, arrays: Any, count: Any, structure: Any, ropes: Any, plan: ProgramPlan
) -> Any:
    def mean_loss(trained: Any) -> Any:
        return summed_loss(structure, trained, frozen, (ropes, frequencies), arrays, None, plan, CausalLoss()) / count

    return jax.value_and_grad(mean_loss)(trained)
