"""What compute_metrics is given: the logits of held-out rows, through the module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from jaxsloth.batch import IGNORE, Batch
from jaxsloth.data.windows import FILLER_ROW


def predictions(model: Any, batches: Sequence[Batch], preprocess: Callable[[Any, Any], Any] | None) -> EvalPrediction:
    """Logits ``[rows, longest, vocab]`` (or what preprocess made of a batch's) and labels ``[rows, longest]``, filled up with
    -100 as transformers does."""
    was_training = model.training
    model.eval()
    made, labels = [], []
    for batch in batches:
        real = batch.rows != FILLER_ROW
        ids = torch.from_numpy(batch.input_ids[real].astype(np.int64))
        mask = torch.from_numpy((batch.segments[real] != 0).astype(np.int64))
        own = np.full(ids.shape, IGNORE, np.int64)
        own[:, 1:] = batch.targets[real][:, :-1]  # targets are shifted already
        with torch.no_grad():
            where: dict[str, Any] = {"attention_mask": mask}
            if batch.segments.max() > 1:  # packed by a collator: positions tell the documents apart
                where = {"position_ids": torch.from_numpy(batch.positions[real].astype(np.int64))}
            logits = model(input_ids=ids, **where).logits
            if preprocess is not None:
                logits = preprocess(logits, torch.from_numpy(own).to(logits.device))
        made.append(logits.cpu().numpy())
        labels.append(own)
    model.train(was_training)
    return EvalPrediction(predictions=_joined(made), label_ids=_joined(labels))


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(array.shape[1] for array in arrays)
    padded = []
    for array in arrays:
        width = [(0, 0), (0, longest - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
        padded.append(np.pad(array, width, constant_values=IGNORE))
    return np.concatenate(padded)
