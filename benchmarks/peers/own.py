"""jaxsloth's own backends, through the Backend protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from benchmarks.work import Runner, Work, adapters, specs
from jaxsloth.backend import BackendName, BuildOptions, OptimizerOptions, load_backend
from jaxsloth.batch import IGNORE, StepBatch
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.objectives.causal_lm import CausalLoss


class OwnRunner:
    """See `Runner`."""

    def __init__(self, backend: BackendName, folder: Path, work: Work) -> None:
        self.framework: Literal["torch", "jax"] = backend
        self._work = work
        self._engine = load_backend(backend)
        base, spec = specs(work)
        self.model = self._engine.build(base, open_checkpoint(folder).source, build_options(work))
        if work.lora:
            self.model.add_adapters(spec, adapters(work))
            self._optimizer = OptimizerOptions(max_grad_norm=None)
            self._step = self.model.step(CausalLoss(), self._optimizer)
        self._done = 0
        self._engine.synchronize()
        if backend == "torch":
            from benchmarks.peers.torch_loop import restart_peak

            restart_peak()

    def step(self, ids: np.ndarray) -> float:
        return self.train_on(step_batch(ids), self._work.learning_rate)

    def train_on(self, tokens: StepBatch, learning_rate: float) -> float:
        """One optimizer step on any batch."""
        result = self._step(tokens, learning_rate=learning_rate, step=self._done, seed=0)
        self._done += 1
        self._engine.synchronize()
        return result.floats()[0]

    def gradients(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Adam's first moment after one step is (1 - β1) times the gradient: so it is the measured program's own."""
        if self._done != 1:
            raise RuntimeError(f"gradients can be told after one step, and {self._done} were made")
        state = self._step.state()
        return {name: state[f"{name}.exp_avg"] / np.float32(1 - self._optimizer.betas[0]) for name in names}

    def peak_memory(self) -> int | None:
        return self._engine.peak_memory()


def build_torch(folder: Path, work: Work) -> Runner:
    from benchmarks.peers.torch_loop import limit_memory

    limit_memory(work)
    return OwnRunner("torch", folder, work)


def build_jax(folder: Path, work: Work) -> Runner:
    """The memory limit, where there is one, reaches JAX through its environment (benchmarks.launch)."""
    return OwnRunner("jax", folder, work)


def build_options(work: Work) -> BuildOptions:
    """The work's settings as BuildOptions.

    Raises:
        ValueError: a setting that BuildOptions does not have; a backend might otherwise run something else under its name.
    """
    hints = get_type_hints(BuildOptions)
    given: dict[str, Any] = {"gradient_checkpointing": work.checkpointing, **work.options}
    for name, value in given.items():
        if name not in {field.name for field in fields(BuildOptions)}:
            raise ValueError(f"BuildOptions has no field {name!r}")
        allowed = get_args(hints[name])
        if allowed and all(isinstance(choice, str) for choice in allowed) and value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
    return BuildOptions(dtype=work.dtype, **given)


def step_batch(ids: np.ndarray) -> StepBatch:
    """One micro-batch whose labels are its inputs: position t must predict token t + 1."""
    ids = ids[None]
    targets = np.full_like(ids, IGNORE)
    targets[..., :-1] = ids[..., 1:]
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[2], dtype=np.int32), ids.shape))
    rows = np.arange(ids.shape[1], dtype=np.int32)[None]
    return StepBatch(ids, targets, np.ones_like(ids), positions, rows, ids.shape[1] * (ids.shape[2] - 1))
