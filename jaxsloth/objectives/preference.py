"""Losses of pairs of answers, one better than the other: DPO and its variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jaxsloth.batch import IGNORE, StepBatch
from jaxsloth.objectives.objective import RowObjective

REFERENCE = "reference"
LossName = Literal["sigmoid", "ipo", "hinge"]
LOSSES: tuple[LossName, ...] = get_args(LossName)


@dataclass(frozen=True)
class PreferenceLoss(RowObjective):
    """The mean over pairs of a function of ``d``: the chosen answer's ``policy - reference`` log-prob minus the rejected one's.
    Rows 2i and 2i + 1 of every micro-batch are pair i's; a pair without a target in either only fills the shape.

    sigmoid: ``-(1 - e)·log sigmoid(beta·d) - e·log sigmoid(-beta·d)``, e the label_smoothing (DPO, Rafailov et al. 2023,
    arXiv:2305.18290; e > 0: conservative DPO, which "sigmoid" of TRL 1.16 leaves out). ipo: ``(d - 1/(2·beta))²`` of log-probs
    that are means over the answer's tokens, as TRL has them (Azar et al. 2023, arXiv:2310.12036). hinge: ``max(0, 1 - beta·d)``
    (Zhao et al. 2023, arXiv:2305.10425).

    Raises:
        ValueError: no such loss; beta not positive; label_smoothing outside [0, 0.5), or with a loss that does not know it.
    """

    loss: LossName = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing belongs to the sigmoid loss; set it to 0 for {self.loss}")

    def prepare(self, step_batch: StepBatch, devices: int) -> tuple[int, dict[str, np.ndarray]]:
        """The step batch's values hold "reference", the reference model's log-probs summed over each row's targets.

        Raises:
            ValueError: it is packed; a device's share of the rows is odd; there is no reference, or of another shape.
        """
        if step_batch.segments.max(initial=0) > 1:
            raise ValueError("pairs of answers are trained a row an answer, got a packed step batch; make it with packing off")
        rows = step_batch.targets.shape[1]
        if rows % (2 * devices):
            raise ValueError(
                f"rows 2i and 2i + 1 are a pair, so a batch must have a multiple of {2 * devices} rows on {devices} device(s), "
                f"got {rows}"
            )
        reference = step_batch.values.get(REFERENCE)
        if reference is None or reference.shape != step_batch.rows.shape:
            got = "none" if reference is None else f"those of {reference.shape}"
            raise ValueError(
                f"the step batch's values must hold a reference log-prob for every row, {step_batch.rows.shape}, got {got}"
            )
        counts = np.count_nonzero(step_batch.targets != IGNORE, axis=2).astype(np.float32)
        pairs = int(np.count_nonzero(counts.reshape(-1, 2).any(axis=1)))
        return max(pairs, 1), {REFERENCE: reference.astype(np.float32), "counts": counts}

    def losses_and_grads(self, xp: Any, log_probs: Any, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        """Losses ``[rows / 2]``, 0 where a pair has no target. arrays: "reference", and "counts", of targets."""
        counts, beta, smoothing = arrays["counts"], self.beta, self.label_smoothing
        real = counts.reshape(-1, 2).sum(1) > 0
        # The loss is of log-probs divided by these.
        lengths = xp.where(counts > 0, counts, 1.0) if self.loss == "ipo" else xp.ones_like(counts)
        ratios = ((log_probs - arrays[REFERENCE]) / lengths).reshape(-1, 2)
        # A reference of rows that fill the shape may be anything: kept out before the loss, so that no gradient sees it.
        delta = xp.where(real, ratios[:, 0] - ratios[:, 1], 0.0)
        if self.loss == "sigmoid":
            right, wrong = _log_sigmoid(xp, beta * delta), _log_sigmoid(xp, -beta * delta)
            losses = -(1.0 - smoothing) * right - smoothing * wrong
            grads = beta * (smoothing * xp.exp(right) - (1.0 - smoothing) * xp.exp(wrong))
        elif self.loss == "hinge":
            margin = 1.0 - beta * delta
            losses = xp.where(margin > 0, margin, 0.0)
            grads = xp.where(margin > 0, xp.full_like(margin, -beta), 0.0)
        else:
            miss = delta - 1.0 / (2.0 * beta)
            losses, grads = miss * miss, 2.0 * miss
        grads = xp.where(real, grads, 0.0)
        return xp.where(real, losses, 0.0), xp.stack([grads, -grads], 1).reshape(-1) / lengths


def _log_sigmoid(xp: Any, x: Any) -> Any:
    """One kernel of torch's; numpy and jax.numpy have none by that name."""
    if hasattr(xp, "nn"):
        return xp.nn.functional.logsigmoid(x)
    return -xp.logaddexp(-x, xp.zeros_like(x))
