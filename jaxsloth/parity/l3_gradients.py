"""L3: LoRA gradients of one batch against PEFT on transformers, float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from jaxsloth.backend import BACKENDS
from jaxsloth.batch import IGNORE, Batch
from jaxsloth.parity import bars
from jaxsloth.parity.measure import Measurement, relative_frobenius
from jaxsloth.parity.subjects import Subjects

RUNG = "L3"


def measure(subjects: Subjects) -> Iterator[Measurement]:
    """B is random, so that A's gradients are not zero. The worst tensor counts."""
    batch = subjects.batch()
    loss, judge = peft_gradients(subjects, batch, subjects.stirred)
    for backend in BACKENDS:
        ours_loss, ours = subjects.ours(backend, subjects.stirred).gradients(batch)
        errors = {name: relative_frobenius(ours[name], gradient) for name, gradient in judge.items()}
        worst = max(errors, key=lambda name: errors[name])
        note = f"{len(errors)} tensors; loss differs by {abs(ours_loss - loss):.1e}; worst: {worst}"
        what = f"{backend} vs PEFT: LoRA gradient, relative Frobenius"
        yield Measurement(RUNG, what, errors[worst], bars.L3_RELATIVE_FROBENIUS, note=note)


def peft_gradients(subjects: Subjects, batch: Batch, values: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """(mean loss over targets, its gradients by PEFT name) from PEFT and torch's own cross-entropy."""
    import torch

    model = subjects.peft(values)
    logits = model(
        input_ids=torch.from_numpy(batch.input_ids.astype(np.int64)),
        attention_mask=torch.from_numpy((batch.segments != 0).astype(np.int64)),
    ).logits
    targets = torch.from_numpy(batch.targets.astype(np.int64))
    # torch sums a float32 softmax over 49k words with an error of 4e-6, the largest of the whole pass: float64 here.
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    gradients = {
        name.replace(".default.", "."): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(loss), gradients
