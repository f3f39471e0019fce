"""TRL's and transformers' trainers, unpatched, over our module models: the losses of 20 steps against transformers and PEFT."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from jaxsloth.backend import BuildOptions
from tests.support.modules import BACKENDS, TRAINING, adapted, lora, our_base, their_base
from tests.support.tiny import CONFIG, WORDS, byte_tokenizer

BAR = 1e-5
STEPS = 20
SETTINGS: dict[str, Any] = {
    **TRAINING,
    "use_cpu": True,
    "bf16": False,
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
}


def token_rows(count: int = 60) -> list[dict[str, list[int]]]:
    generator = np.random.default_rng(0)
    rows = [generator.integers(2, CONFIG["vocab_size"], generator.integers(8, 40)).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": [-100] * 3 + row[3:], "attention_mask": [1] * len(row)} for row in rows]


def preferences() -> list[dict[str, str]]:
    return [
        {"prompt": f"say {n} ", "chosen": " ".join(WORDS[: 2 + n % 4]), "rejected": " ".join(WORDS[5 : 7 + n % 3])}
        for n in range(60)
    ]


def recording(trainer: type[Any]) -> type[Any]:
    """The trainer, which keeps each loss at full precision: what it logs is rounded."""

    class Recording(trainer):
        losses: tuple[float, ...] = ()

        def compute_loss(self, *arguments: Any, **settings: Any) -> Any:
            out = super().compute_loss(*arguments, **settings)
            loss = out[0] if isinstance(out, tuple) else out
            self.losses += (float(loss.detach()),)
            return out

    return Recording


def sft(model: Any, folder: str, /, **changes: Any) -> Any:
    columns = ["input_ids"] if changes.get("packing") else ["input_ids", "labels"]
    data = Dataset.from_list([{column: row[column] for column in columns} for row in token_rows()])
    config = SFTConfig(output_dir=folder, **(SETTINGS | {"max_length": 64} | changes))
    return recording(SFTTrainer)(model, args=config, train_dataset=data, processing_class=byte_tokenizer())


def hugging_face(model: Any, folder: str, /, **changes: Any) -> Any:
    config = TrainingArguments(output_dir=folder, **(SETTINGS | changes))
    data, collator = Dataset.from_list(token_rows()), DataCollatorForSeq2Seq(byte_tokenizer())
    return recording(Trainer)(
        model, args=config, train_dataset=data, eval_dataset=data.select(range(4)), data_collator=collator
    )


def dpo(model: Any, folder: str, /, **changes: Any) -> Any:
    """On a bare model; the trainer adds the adapter, and its reference is the model with the adapter off."""
    config = DPOConfig(output_dir=folder, **(SETTINGS | {"max_length": 64} | changes))
    data = Dataset.from_list(preferences())
    return recording(DPOTrainer)(
        model, args=config, train_dataset=data, processing_class=byte_tokenizer(), peft_config=lora(init_lora_weights=True)
    )


def dpo_from_adapter(model: Any, folder: str, /, **changes: Any) -> Any:
    """On a model with an adapter: the trainer copies it into a second one, its reference."""
    config = DPOConfig(output_dir=folder, **(SETTINGS | {"max_length": 64} | changes))
    return recording(DPOTrainer)(
        adapted(model), args=config, train_dataset=Dataset.from_list(preferences()), processing_class=byte_tokenizer()
    )


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft, accumulation 2": (lambda model, *a, **k: sft(adapted(model), *a, **k), {"gradient_accumulation_steps": 2}),
    "sft, packing": (lambda model, *a, **k: sft(adapted(model), *a, **k), {"packing": True, "gradient_accumulation_steps": 2}),
    "sft, padding-free": (lambda model, *a, **k: sft(adapted(model), *a, **k), {"padding_free": True, "max_length": None}),
    "trainer, accumulation 2": (
        lambda model, *a, **k: hugging_face(adapted(model), *a, **k),
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ),
    "trainer, label smoothing": (
        lambda model, *a, **k: hugging_face(adapted(model), *a, **k),
        {"label_smoothing_factor": 0.1},
    ),
    "dpo, accumulation 2": (dpo, {"gradient_accumulation_steps": 2}),
    "dpo, precomputed reference": (dpo, {"precompute_ref_log_probs": True}),
    "dpo, adapter as reference": (dpo_from_adapter, {}),
}


def losses_of(case: str, base: Any, folder: Path) -> np.ndarray:
    make, changes = CASES[case]
    torch.manual_seed(0)
    trainer = make(base, str(folder), **changes)
    trainer.train()
    return np.array(trainer.losses)


@cache
def judged(case: str, folder: Path) -> np.ndarray:
    return losses_of(case, their_base(), folder)


@pytest.fixture(scope="module")
def judges_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("judge")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_transformers_and_peft(case, backend, tmp_path, judges_folder):
    judge = judged(case, judges_folder)
    ours = losses_of(case, our_base(backend), tmp_path)
    assert len(ours) == len(judge) >= STEPS
    assert np.ptp(judge) > 0.3  # there is something to be wrong about
    assert np.abs(ours - judge).max() < BAR


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *(("trainer, accumulation 2", backend) for backend in BACKENDS),
        *((f"{trainer}, accumulation 2", "torch") for trainer in ("sft", "dpo")),
    ],
)
def test_the_fused_passes_train_as_transformers_and_peft(case, backend, tmp_path, judges_folder):
    judge = judged(case, judges_folder)
    options = BuildOptions(gradient_checkpointing="selective", implementations={"train_pass": "fused"})
    ours = losses_of(case, our_base(backend, options=options), tmp_path)
    assert np.abs(ours - judge).max() < BAR


@pytest.mark.slow
def test_a_resumed_run_and_its_evaluation_are_transformers(tmp_path):
    """Saved at step 10 and resumed by new models, with evaluation: losses and metrics of both continue alike."""

    def run(base: Any, name: str) -> tuple[np.ndarray, dict[str, float]]:
        changes = {"save_strategy": "steps", "save_steps": 10, "per_device_eval_batch_size": 2}
        hugging_face(adapted(base()), str(tmp_path / name), **changes, max_steps=10).train()
        trainer = hugging_face(adapted(base()), str(tmp_path / name), **changes)
        trainer.compute_metrics = lambda seen: {"top": float((seen.predictions.argmax(-1) == seen.label_ids).mean())}
        trainer.train(resume_from_checkpoint=True)
        return np.array(trainer.losses), trainer.evaluate()

    judge, judged_metrics = run(their_base, "theirs")
    ours, metrics = run(lambda: our_base("jax"), "ours")
    assert len(ours) == len(judge) == STEPS - 10
    assert np.abs(ours - judge).max() < BAR
    assert metrics["eval_loss"] == pytest.approx(judged_metrics["eval_loss"], abs=BAR)
    assert metrics["eval_top"] == judged_metrics["eval_top"]
