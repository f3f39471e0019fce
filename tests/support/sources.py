"""A checkpoint in memory, and transformers' model of the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxsloth.batch import Batch
from jaxsloth.data.encode import Example
from jaxsloth.data.step_batches import StepBatches


class DictSource:
    """A TensorSource over arrays by name."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = dict(arrays)

    def names(self) -> Sequence[str]:
        return tuple(self.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.arrays[name].shape)

    def read(self, name: str) -> Any:
        return self.arrays[name]


def transformers_model(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Any:
    """transformers' model of a config.json's family holding `weights`, float32, in evaluation mode."""
    fields = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    made = AutoConfig.for_model(config["model_type"], **fields)
    attention = "eager" if config["model_type"] == "gemma2" else None  # torch's attention knows no soft cap
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention).float().eval()
    state = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def examples(count: int, vocab: int, seed: int = 3, longest: int = 40) -> list[Example]:
    """Random rows of unequal lengths; the first third of each is not learnt."""
    generator = np.random.Generator(np.random.Philox(seed))
    rows = []
    for _ in range(count):
        length = int(generator.integers(6, longest))
        rows.append(Example(generator.integers(0, vocab, length).astype(np.int32), np.arange(length) >= length // 3))
    return rows


def stream(rows: Sequence[Example], **changes: Any) -> StepBatches:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "accumulation": 1,
        "seed": 0,
        "shuffle": False,
        "packing": False,
        "max_length": 64,
        "pad_to_multiple_of": 32,
        "devices": 1,
    }
    return StepBatches(rows, **(settings | changes))


def first_batch(step_batches: StepBatches, step: int = 0) -> Batch:
    """The first micro-batch of a step."""
    return step_batches.batch(step).micro(0)
