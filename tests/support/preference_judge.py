"""Pairs of answers as a step batch, and what TRL's own DPOTrainer says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxsloth.batch import IGNORE, StepBatch
from jaxsloth.objectives.preference import PreferenceLoss
from tests.support.sources import transformers_model
from tests.support.tiny import CONFIG, byte_tokenizer

# Prompts and answers of unequal lengths.
PAIRS = [
    {"prompt": "ducks ", "chosen": "lay eggs", "rejected": "fly to the market at noon"},
    {"prompt": "a day at the market ", "chosen": "ends with sixteen eggs sold", "rejected": "no"},
    {"prompt": "e", "chosen": "very duck", "rejected": "gg"},
    {"prompt": "and then ", "chosen": "she sells them", "rejected": "they sell her"},
]
SMALL = CONFIG | {"num_hidden_layers": 2}
RANK, ALPHA = 4, 8.0


def step_batch_of(examples: list[dict[str, Any]], micros: int, filling: int = 0, length: int = 64) -> StepBatch:
    """TRL's tokenized pairs as a step batch of `micros` micro-batches, the last with `filling` pairs of nothing behind."""
    rows = [(example["prompt_ids"], example[side]) for example in examples for side in ("chosen_ids", "rejected_ids")]
    count = len(rows) + 2 * filling
    ids, targets = np.zeros((count, length), np.int32), np.full((count, length), IGNORE, np.int32)
    segments, positions = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    for place, (prompt, answer) in enumerate(rows):
        whole, start = prompt + answer, len(prompt)
        ids[place, : len(whole)], segments[place, : len(whole)] = whole, 1
        positions[place, : len(whole)] = np.arange(len(whole))
        targets[place, start - 1 : len(whole) - 1] = whole[start:]
    numbers = np.where(segments.any(axis=1), np.arange(count), -1).astype(np.int32)
    shape = (micros, count // micros)
    ids, targets, segments, positions = (array.reshape(*shape, length) for array in (ids, targets, segments, positions))
    return StepBatch(ids, targets, segments, positions, numbers.reshape(shape), int((targets != IGNORE).sum()))


@dataclass(frozen=True)
class Verdict:
    loss: float
    gradients: dict[str, np.ndarray]  # by PEFT name


class Judge:
    """TRL's trainer over transformers' Llama under PEFT, holding the adapter `values`; the reference is the adapter off."""

    def __init__(self, folder: Path, weights: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray], **lora: Any) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        arguments = DPOConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **lora)
        self._trainer = DPOTrainer(
            transformers_model(SMALL, weights),
            args=arguments,
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=byte_tokenizer(),
            peft_config=config,
        )
        with torch.no_grad():
            for name, parameter in self._named().items():
                parameter.copy_(torch.from_numpy(values[name]))
        self.examples: list[dict[str, Any]] = self._trainer.train_dataset.to_list()

    def _named(self) -> dict[str, torch.nn.Parameter]:
        trained = {n: p for n, p in self._trainer.model.named_parameters() if p.requires_grad}
        return {n.replace(".modules_to_save", "").replace(".default", ""): p for n, p in trained.items()}

    def _inputs(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self._trainer.data_collator(examples)

    def log_probs(self, adapters: bool) -> np.ndarray:
        """``[rows]``, chosen and rejected in turn."""
        trainer = self._trainer
        if adapters:
            self.judge(PreferenceLoss())  # leaves a mean over each of its batches of one pair
            sides = [trainer._metrics["train"][f"logps/{side}"][-len(self.examples) :] for side in ("chosen", "rejected")]
        else:
            sides = [side.numpy() for side in trainer.compute_ref_log_probs(trainer.model, self._inputs(self.examples))]
        return np.stack(sides, axis=1).reshape(-1)

    def judge(self, options: PreferenceLoss) -> Verdict:
        """The mean loss of the pairs and its gradients, a pair at a time.

        TRL's "sigmoid" leaves label_smoothing out; its "aot", which has it, is conservative DPO where a batch is one pair.
        """
        trainer, named = self._trainer, self._named()
        trainer.loss_types = ["aot" if options.label_smoothing else options.loss]
        trainer.beta, trainer.label_smoothing = options.beta, options.label_smoothing
        for parameter in named.values():
            parameter.grad = None
        total = 0.0
        for example in self.examples:
            loss = trainer._compute_loss(trainer.model, self._inputs([example]), False) / len(self.examples)
            loss.backward()
            total += loss.item()
        return Verdict(total, {name: parameter.grad.numpy().copy() for name, parameter in named.items()})
