"""What a preference run compares with, and what it says of itself: log-probs of the reference, and TRL's metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxsloth.backend import Step, StepResult
from jaxsloth.batch import Batch, StepBatch
from jaxsloth.data.encode import Example
from jaxsloth.data.step_batches import FILLER_ROW, StepBatches
from jaxsloth.objectives.preference import REFERENCE

Score = Callable[[Sequence[Example]], np.ndarray]


def score_rows(log_probs: Callable[[Batch], np.ndarray], batches: Sequence[Batch]) -> np.ndarray:
    """float32 ``[rows]``: summed log-probs of the batches' rows, in their order, without those that only fill the shape."""
    return np.concatenate([log_probs(batch)[batch.rows != FILLER_ROW] for batch in batches])


class References:
    """The reference model's summed log-probs of answers. It never changes, so each answer is scored once, however often the
    rows that it stands in are encoded anew: it is known by a digest of its tokens and of which of them are learnt."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._known: dict[bytes, float] = {}

    def know(self, known: Mapping[Example, float]) -> None:
        """Takes what was computed elsewhere."""
        self._known |= {_digest(example): value for example, value in known.items()}

    def of(self, examples: Sequence[Example]) -> np.ndarray:
        """float32 ``[examples]``; those that aren't known yet are scored now."""
        keys = [_digest(example) for example in examples]
        unknown = {key: example for key, example in zip(keys, examples, strict=True) if key not in self._known}
        if unknown:
            self._known |= dict(zip(unknown, self._score(list(unknown.values())).tolist(), strict=True))
        return np.array([self._known[key] for key in keys], np.float32)


def _digest(example: Example) -> bytes:
    parts = np.asarray(example.tokens, np.int32).tobytes(), np.asarray(example.learn, bool).tobytes()
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


@dataclass(frozen=True)
class Compared(StepResult):
    """A step's result with what it was compared with: reference and real (rows that don't only fill the shape)
    ``[accumulation, batch]``."""

    reference: Any = None
    real: Any = None

    def metrics(self, beta: float) -> list[dict[str, float]]:
        """A dict a micro-batch."""
        policy = self.host_log_probs()
        micros = zip(policy, self.reference, self.real, strict=True)
        return [pair_metrics(own[real], other[real], beta) for own, other, real in micros if real.any()]


class ReferredStep:
    """A step over pairs as a run takes steps: each step batch is shown with its reference."""

    def __init__(self, step: Step, step_batches: StepBatches, examples: Sequence[Example], references: References) -> None:
        self._step, self._step_batches, self._examples, self._references = step, step_batches, examples, references

    def __call__(self, step_batch: StepBatch, *, learning_rate: float, step: int, seed: int) -> Compared:
        values = self._references.of([self._examples[row] for row in self._step_batches.rows_of(step)])
        real = step_batch.rows != FILLER_ROW
        reference = np.zeros(step_batch.rows.shape, np.float32)
        reference[real] = values[step_batch.rows[real]]
        compared = replace(step_batch, values={REFERENCE: reference})
        result = self._step(compared, learning_rate=learning_rate, step=step, seed=seed)
        return Compared(**vars(result), reference=reference, real=real)

    def state(self) -> dict[str, np.ndarray]:
        return self._step.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._step.load_state(state)

    def freeze(self, names: Collection[str]) -> None:
        self._step.freeze(names)


def pair_metrics(policy: np.ndarray, reference: np.ndarray, beta: float) -> dict[str, float]:
    """TRL's metrics of pairs whose log-probs are ``[2 * pairs]``, the chosen answer's before the rejected one's."""
    rewards = beta * (policy.astype(np.float64) - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    return {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/accuracies": float((chosen > rejected).mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "logps/chosen": float(policy[0::2].astype(np.float64).mean()),
        "logps/rejected": float(policy[1::2].astype(np.float64).mean()),
    }
