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
        inputs = module_inputs(batch)
        own = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs).logits
            if preprocess is not None:
                logits = preprocess(logits, own.to(logits.device))
        made.append(logits.cpu().numpy())
        labels.append(own.numpy())
    model.train(was_training)
    return EvalPrediction(predictions=_joined(made), label_ids=_joined(labels))


def module_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch's rows in transformers' terms, int64: input_ids, labels (not shifted), and what tells padding, or documents where
    rows are packed, apart."""
    real = batch.rows != FILLER_ROW
    ids = torch.from_numpy(batch.input_ids[real].astype(np.int64))
    labels = np.full(ids.shape, IGNORE, np.int64)
    labels[:, 1:] = batch.targets[real][:, :-1]  # targets are shifted already
    where = {"attention_mask": torch.from_numpy((batch.segments[real] != 0).astype(np.int64))}
    if batch.segments.max() > 1:  # positions tell the documents apart
        where = {"position_ids": torch.from_numpy(batch.positions[real].astype(np.int64))}
    return {"input_ids": ids, **where, "labels": torch.from_numpy(labels)}


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(array.shape[1] for array in arrays)
    padded = []
    for array in arrays:
        width = [(0, 0), (0, longest - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
        padded.append(np.pad(array, width, constant_values=IGNORE))
    return np.concatenate(padded)
