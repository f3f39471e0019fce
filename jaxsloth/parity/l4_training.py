"""L4: the loss at each of 50 training steps: torch against JAX, and each against TRL's SFTTrainer on the same rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxsloth.backend import OptimizerOptions
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity import bars
from jaxsloth.parity.measure import Measurement
from jaxsloth.parity.subjects import BATCH, LENGTH, SEED, Subjects
from jaxsloth.recipe import ScheduleRecipe
from jaxsloth.training.schedule import learning_rate

RUNG = "L4"
LEARNING_RATE = 1e-3
WARMUP = 5
CLIP = 0.5
OPTIONS = OptimizerOptions(weight_decay=0.1, max_grad_norm=CLIP)
MUTANTS: dict[str, tuple[OptimizerOptions, int]] = {
    "no weight decay": (replace(OPTIONS, weight_decay=0.0), 0),
    "beta2 0.99": (replace(OPTIONS, betas=(0.9, 0.99)), 0),
    "eps 1e-6": (replace(OPTIONS, eps=1e-6), 0),
    "schedule one step ahead": (OPTIONS, 1),
}


@dataclass(frozen=True)
class Run:
    """The losses of a run before each update, the gradient norms before clipping (ours only), and the adapter that it left."""

    losses: np.ndarray
    grad_norms: np.ndarray
    adapter: Mapping[str, np.ndarray]


def measure(subjects: Subjects, runs: Mapping[str, Run] | None = None) -> Iterator[Measurement]:
    """All comparisons and the mutants; `runs` may bring the three runs ("torch", "jax", "trl") that a caller already has."""
    runs = runs or {"torch": train(subjects, "torch"), "jax": train(subjects, "jax"), "trl": train_trl(subjects)}
    losses = {name: run.losses for name, run in runs.items()}
    for first, second, bar in (
        ("torch", "jax", bars.L4_BACKENDS),
        ("torch", "trl", bars.L4_JUDGE),
        ("jax", "trl", bars.L4_JUDGE),
    ):
        gap = np.abs(losses[first] - losses[second])
        note = f"{len(gap)} steps; worst at step {int(gap.argmax()) + 1}"
        yield Measurement(RUNG, f"{first} vs {second}: loss of every step", float(gap.max()), bar, note=note)
    moved = float(losses["trl"][:5].mean() - losses["trl"][-5:].mean())
    yield Measurement(RUNG, "the loss moves (first 5 - last 5 steps)", moved, bars.L4_LOSS_MUST_MOVE, "above")
    clipped = float(np.mean(runs["torch"].grad_norms > CLIP))
    yield Measurement(RUNG, "share of steps that clip", clipped, 0.5, "above")
    for name, (options, shift) in MUTANTS.items():
        gap, step = first_miss(subjects, losses["trl"], options, shift)
        yield Measurement(RUNG, f"mutant must miss: {name}", gap, bars.L4_JUDGE, "above", note=f"at step {step}")


def train(subjects: Subjects, backend: str) -> Run:
    """`bars.L4_STEPS` steps of one of our backends from the initial adapter."""
    model = subjects.ours(backend, subjects.initial)
    steps = list(_steps(model, subjects, OPTIONS, 0))
    return Run(np.array([s[0] for s in steps]), np.array([s[1] for s in steps]), model.trainable())


def first_miss(subjects: Subjects, judge: np.ndarray, options: OptimizerOptions, shift: int) -> tuple[float, int]:
    """Trains a mutant on torch until its loss leaves the judge's by more than the bar: (the gap, the step from 1)."""
    model = subjects.ours("torch", subjects.initial)
    gap = 0.0
    step = 0
    for step, (loss, _) in enumerate(_steps(model, subjects, options, shift), start=1):
        gap = abs(loss - float(judge[step - 1]))
        if gap > bars.L4_JUDGE:
            break
    return gap, step


def _steps(model: Any, subjects: Subjects, options: OptimizerOptions, shift: int) -> Iterator[tuple[float, float]]:
    stream, step_function = subjects.stream(), model.step(CausalLoss(), options)
    schedule = ScheduleRecipe(kind="linear", warmup_steps=WARMUP)
    for step in range(bars.L4_STEPS):
        rate = learning_rate(step + shift, bars.L4_STEPS, LEARNING_RATE, schedule)
        result = step_function(stream.batch(step), learning_rate=rate, step=step, seed=SEED)
        loss, grad_norm, _ = result.floats()
        yield loss, grad_norm


def train_trl(subjects: Subjects) -> Run:
    """The judge: TRL's SFTTrainer on transformers and PEFT, unpatched, from our initial adapter."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []

    class RecordingTrainer(SFTTrainer):
        """Keeps each step's loss at full precision: what trainers log is rounded."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            out = super().compute_loss(*args, **kwargs)
            losses.append(float((out[0] if isinstance(out, tuple) else out).detach()))
            return out

    rows = subjects.examples[: bars.L4_STEPS * BATCH]
    data = Dataset.from_dict(
        {
            "input_ids": [row.tokens.tolist() for row in rows],
            "labels": [np.where(row.learn, row.tokens, -100).tolist() for row in rows],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_steps=bars.L4_STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP,
            weight_decay=OPTIONS.weight_decay,
            adam_beta1=OPTIONS.betas[0],
            adam_beta2=OPTIONS.betas[1],
            adam_epsilon=OPTIONS.eps,
            max_grad_norm=CLIP,
            max_length=LENGTH,
            train_sampling_strategy="sequential",
            logging_steps=1,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            optim="adamw_torch",
        )
        model = subjects.peft(subjects.initial)
        trainer = RecordingTrainer(model, args=config, train_dataset=data, processing_class=subjects.tokenizer)
        trainer.train()
    adapter = {n.replace(".default.", "."): p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
    return Run(np.array(losses), np.array([]), adapter)
