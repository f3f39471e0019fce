"""An objective: the loss of a training step as a function of its targets' log-probs, stated once for both backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsloth.batch import StepBatch


class Objective(ABC):
    """The settings of a loss, a frozen dataclass: equal objectives share compiled programs and CUDA graphs, so all that changes
    from step to step is in arrays.

    The loss of a step is a sum over its targets, micro-batches and devices, divided by `prepare`'s count. This class sums the
    targets' cross-entropies; a `RowObjective` says what it makes of each row's.
    """

    @property
    def smoothing(self) -> float:
        """The label smoothing of the targets' cross-entropies."""
        return 0.0

    @property
    def noise(self) -> float:
        """NEFTune's alpha (`kernels/embedding_noise`), keyed by the step's seed and number; 0 adds none."""
        return 0.0

    @abstractmethod
    def prepare(self, step_batch: StepBatch, devices: int) -> tuple[int, dict[str, np.ndarray]]:
        """(the count that the loss is divided by, at least 1; the arrays of `RowObjective.losses_and_grads`, float32
        ``[accumulation, batch]``).

        Raises:
            ValueError: the step batch is not what this loss is defined on.
        """


class RowObjective(Objective):
    """A function of the log-probs summed over each row's targets."""

    @abstractmethod
    def losses_and_grads(self, xp: Any, log_probs: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        """(the losses, in any shape; the gradient of their sum by `log_probs`, ``[rows]``).

        log_probs and the arrays that `prepare` names are ``[rows]``, of the framework whose namespace is xp: torch, jax.numpy
        or numpy. JAX differentiates the losses and leaves the stated gradient alone.
        """
