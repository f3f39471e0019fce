"""What compute_metrics is given: the logits of held-out rows, through the module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from jaxsloth.batch import IGNORE, Batch
from jaxsloth.data.step_batches import FILLER_ROW


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
            logits = model(**inputs, use_cache=False).logits  # with a cache packed documents would see each other
            if preprocess is not None:
                logits = preprocess(logits, own.to(logits.device))
        made.append(logits.cpu().numpy())
        labels.append(own.numpy())
    model.train(was_training)
    return EvalPrediction(predictions=_joined(made), label_ids=_joined(labels))


_OF_TOKENS = ("entropy", "mean_token_accuracy")
_OF_ANSWERS = ("logits/chosen", "logits/rejected")
_OF_SPEED = ("runtime", "samples_per_second", "steps_per_second")


def asks_for_logits(metric: str | None, pairs: bool) -> bool:
    """Whether the best checkpoint is chosen by a metric that TRL makes of logits. The losses here keep none, so evaluations
    then run their rows once more."""
    return str(metric).endswith((*_OF_TOKENS, *(_OF_ANSWERS if pairs else ())))


def check_best(metric: str, own: Sequence[str], pairs: bool, data_sets: Sequence[str]) -> None:
    """ValueError where an evaluation of these data sets (none: of one without a name) will not have the metric. TRL's own
    metrics are called alike for every data set."""
    by_set = ("loss", *_OF_SPEED)
    names = [f"{data_set}_{name}" for data_set in data_sets for name in by_set] or list(by_set)
    names += [*(name for name in own if name != "loss"), *_OF_TOKENS, *(_OF_ANSWERS if pairs else ())]
    if metric.removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model is {metric!r}, and evaluations here have: {', '.join(names)}")


def token_metrics(model: Any, batches: Sequence[Batch], pairs: bool) -> dict[str, float]:
    """TRL's metrics that ask for logits, through the module: the mean over batches of each one's mean over learnt tokens.

    pairs: rows 2i and 2i + 1 are a chosen and a rejected answer, of whose chosen ones accuracy counts, and logits are told.
    """
    was_training, found = model.training, []
    model.eval()
    for batch in batches:
        inputs = module_inputs(batch)
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            labels = labels.to(logits.device)
            learnt, logs = labels != IGNORE, logits.log_softmax(-1)
            entropy, right = -(logs.exp() * logs).sum(-1), logits.argmax(-1) == labels
            chosen = learnt.clone()
            chosen[1::2] &= not pairs
            values = [(entropy, learnt), (right, chosen)]
            if pairs:
                values += [(logits.mean(-1), chosen), (logits.mean(-1), learnt & ~chosen)]
            names = (*_OF_TOKENS, *(_OF_ANSWERS if pairs else ()))
            sums = [(float(value[counts].sum()), int(counts.sum())) for value, counts in values]
        found.append({name: total / count if count else 0.0 for name, (total, count) in zip(names, sums, strict=True)})
    model.train(was_training)
    return {name: float(np.mean([own[name] for own in found])) for name in found[0]}


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
