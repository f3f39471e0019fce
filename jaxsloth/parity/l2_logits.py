"""L2: logits against transformers on the checkpoint's real weights, float32; and packed rows against padded ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxsloth.backend import BACKENDS
from jaxsloth.batch import IGNORE, Batch
from jaxsloth.parity import bars
from jaxsloth.parity.measure import Measurement, max_abs, top1_disagreements
from jaxsloth.parity.subjects import Subjects, judge_logits, valid_rows

RUNG = "L2"


def measure(subjects: Subjects) -> Iterator[Measurement]:
    """Adapters at their start (B = 0), so that the model is the checkpoint."""
    batch = subjects.batch()
    judge = valid_rows(judge_logits(subjects.theirs(), batch), batch)
    packed = pack(batch)
    for backend in BACKENDS:
        model = subjects.ours(backend, subjects.initial)
        logits = valid_rows(model.logits(batch), batch)
        note = f"{len(judge)} tokens"
        yield Measurement(RUNG, f"{backend} vs transformers: max abs logit", max_abs(logits, judge), bars.L2_MAX_ABS, note=note)
        wrong = top1_disagreements(logits, judge, bars.L2_TOP2_GAP)
        yield Measurement(RUNG, f"{backend} vs transformers: other top-1", wrong, bars.L2_TOP1_DISAGREEMENTS)
        together = valid_rows(model.logits(packed), packed)
        yield Measurement(RUNG, f"{backend}: packed vs padded, max abs logit", max_abs(together, logits), bars.L2_MAX_ABS)


def pack(batch: Batch) -> Batch:
    """The rows of a padded batch as the documents of one row, in order."""
    kept = batch.segments != 0
    documents = np.broadcast_to(np.arange(1, len(kept) + 1, dtype=np.int32)[:, None], kept.shape)
    size = int(kept.sum())
    width = kept.size  # the padded batch's own token count, so that one shape serves both

    def flat(values: np.ndarray, fill: int) -> np.ndarray:
        return np.concatenate([values[kept], np.full(width - size, fill)]).astype(np.int32)[None]

    return Batch(
        input_ids=flat(batch.input_ids, 0),
        targets=flat(batch.targets, IGNORE),
        segments=flat(documents, 0),
        positions=flat(batch.positions, 0),
        rows=np.zeros(1, np.int32),
    )
