"""Steps over pairs of answers, for processes of their own: python -m tests.support.preference_steps BACKEND FILE.npz"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from jaxsloth.backend import BuildOptions, OptimizerOptions, load_backend
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.objectives.preference import REFERENCE, PreferenceLoss
from jaxsloth.transforms import add_lora
from tests.support.preference_judge import SMALL, step_batch_of
from tests.support.sources import DictSource
from tests.support.tiny import random_weights


def run(name: str) -> dict[str, np.ndarray]:
    """Three steps over two micro-batches of four pairs, the last of them empty."""
    backend = load_backend(name)
    model = backend.build(spec_from_config(SMALL), DictSource(random_weights(SMALL, 1)), BuildOptions())
    spec = add_lora(model.spec, r=4, alpha=8.0)
    generator = np.random.Generator(np.random.Philox(5))
    shapes = trainable_shapes(spec)
    model.add_adapters(spec, {name: generator.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()})
    pairs = [
        {"prompt_ids": [3, 4, 5], "chosen_ids": [9] * (6 + place), "rejected_ids": [7, 8] * (9 - place)} for place in range(7)
    ]
    step_batch, off = step_batch_of(pairs, 2, filling=1), model.row_log_probs(adapters=False)
    reference = np.stack([off(step_batch.micro(micro)) for micro in range(2)])
    step_batch = replace(step_batch, values={REFERENCE: reference})
    step = model.step(PreferenceLoss(beta=0.5), OptimizerOptions())
    results = [step(step_batch, learning_rate=1e-2, step=place, seed=0) for place in range(3)]
    if backend.devices().rank == 0:
        print(backend.devices().count, "devices")
    return {
        "reference": reference,
        "losses": np.array([result.floats()[:2] for result in results]),
        "log_probs": np.stack([result.host_log_probs() for result in results]),
        **model.trainable(),
    }


if __name__ == "__main__":
    found = run(sys.argv[1])
    if load_backend(sys.argv[1]).devices().rank == 0:
        np.savez(sys.argv[2], **found)  # pyright: ignore[reportArgumentType]
