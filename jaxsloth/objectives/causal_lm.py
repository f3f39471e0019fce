"""Cross-entropy over a causal model's targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxsloth.batch import StepBatch
from jaxsloth.objectives.objective import Objective


@dataclass(frozen=True)
class CausalLoss(Objective):
    """The mean of ``-log p(target)`` over all targets of a step.

    label_smoothing: as `kernels/linear_cross_entropy` has it. embedding_noise: see `Objective.noise`.

    Raises:
        ValueError: embedding_noise negative or infinite; label_smoothing outside [0, 1).
    """

    label_smoothing: float = 0.0
    embedding_noise: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in (("label_smoothing", 1.0), ("embedding_noise", float("inf"))):
            if not 0.0 <= getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least 0 and below {limit}, got {getattr(self, name)}")

    @property
    def smoothing(self) -> float:
        return self.label_smoothing

    @property
    def noise(self) -> float:
        return self.embedding_noise

    def prepare(self, step_batch: StepBatch, devices: int) -> tuple[int, dict[str, np.ndarray]]:
        del devices
        return max(step_batch.valid_tokens, 1), {}
