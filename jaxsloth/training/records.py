"""A run's plan, its files and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jaxsloth.backend import Backend, DeviceInfo, DtypeName, Model
from jaxsloth.batch import Batch
from jaxsloth.convert.files import write_text
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.step_batches import StepBatches
from jaxsloth.foreign import local_path
from jaxsloth.models.spec import ModelSpec
from jaxsloth.recipe import Recipe
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.checkpoint import SavedRun, TrainerState
from jaxsloth.training.fingerprints import Fingerprints
from jaxsloth.training.fit import Progress
from jaxsloth.training.log import Entry, RunLog
from jaxsloth.training.plot import plot_losses

ADAPTER, LOG, PLOT, RECIPE = "adapter", "log.jsonl", "loss.png", "recipe.yaml"


def output_folder(recipe: Recipe) -> Path:
    """Where a run writes, ``~`` expanded."""
    return local_path(recipe.checkpoints.output, "checkpoints.output", CheckpointError)


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed every check that needs no weights."""

    recipe: Recipe
    backend: Backend
    devices: DeviceInfo
    dtype: DtypeName
    spec: ModelSpec  # with adapters, quantized
    base_model: str
    step_batches: StepBatches
    held_out: list[Batch]
    total_steps: int
    resume: SavedRun | None
    fingerprints: Fingerprints | None = None
    start: Mapping[str, np.ndarray] | None = None  # the values of the recipe's lora.adapter
    goes_on: bool = False  # a run of the folder's, though perhaps one that was killed before its first checkpoint

    @property
    def output(self) -> Path:
        return output_folder(self.recipe)


@dataclass(frozen=True)
class RunResult:
    """What a run came to. Losses are nats a token; seconds are of training alone, first_tokens and first_seconds those of
    each part's first step; peak_memory is bytes on one device (on_host: of the process) since the process began."""

    steps: int
    first_loss: float
    final_loss: float
    eval_loss: float | None
    tokens: int
    seconds: float
    first_tokens: int
    first_seconds: float
    peak_memory: int | None
    on_host: bool
    output: Path
    entries: list[Entry]

    @property
    def tokens_per_s(self) -> float | None:
        """The whole run's mean without first steps, whose time is compiling; None where there was no other step."""
        seconds = self.seconds - self.first_seconds
        return (self.tokens - self.first_tokens) / seconds if self.tokens > self.first_tokens and seconds > 0 else None

    def summary_table(self) -> Table:
        table = Table(title="summary", show_header=False)
        first = f"the first step: {self.first_seconds:.1f} s"
        speed = f"{self.tokens_per_s:,.0f} tokens/s without {first}" if self.tokens_per_s is not None else first
        memory = "peak memory (of the process)" if self.on_host else "peak memory"
        rows = [
            ("steps", str(self.steps)),
            ("loss", f"{self.first_loss:.4f} → {self.final_loss:.4f}"),
            *([("held-out loss", f"{self.eval_loss:.4f}")] if self.eval_loss is not None else []),
            ("tokens", f"{self.tokens:,} in {self.seconds:.1f} s ({speed})"),
            *([(memory, f"{self.peak_memory / 2**30:.2f} GiB")] if self.peak_memory is not None else []),
            ("files", f"{self.output}: {ADAPTER}/, {LOG}, {PLOT}"),
        ]
        for row in rows:
            table.add_row(*row)
        return table


class Bookkeeping:
    """The run's files: log, checkpoints, adapter, plot. On other processes than the first it only keeps entries."""

    def __init__(self, plan: RunPlan, model: Model, main: bool, on_stage: Callable[[str], None] | None) -> None:
        self._plan, self._model, self._main = plan, model, main
        self._stages = {} if on_stage is None else {"on_stage": on_stage}
        self._entries: list[Entry] = []
        self._log: RunLog | None = None
        if main:
            plan.output.mkdir(parents=True, exist_ok=True)
            first_step = plan.resume.state.step if plan.resume is not None else 0
            checkpoints.clean(plan.output, first_step)
            self._prune(plan.resume.state.best_step if plan.resume is not None else None)
            write_text(plan.output / RECIPE, plan.recipe.to_yaml())
            self._log = RunLog(plan.output / LOG, first_step)

    @property
    def entries(self) -> list[Entry]:
        return self._entries if self._log is None else self._log.entries

    def on_log(self, entry: Entry) -> None:
        if self._log is None:
            self._entries.append(entry)
        else:
            self._log.write(entry)

    on_evaluate = on_log

    def on_save(self, step: int) -> None:
        del step

    def save(self, progress: Progress, optimizer: dict[str, Any]) -> None:
        if self._main:
            plan = self._plan
            state = TrainerState(
                step=progress.step,
                backend=plan.backend.name,
                recipe=plan.recipe.model_dump(mode="json"),
                tokens=progress.tokens,
                seconds=progress.seconds,
                first_tokens=progress.first_tokens,
                first_seconds=progress.first_seconds,
                best_step=progress.best_step,
                best_loss=progress.best_loss,
                devices=plan.devices.count,
            )
            adapter = self._model.trainable()
            checkpoints.save(
                plan.output,
                state,
                plan.spec,
                adapter,
                optimizer,
                plan.base_model,
                **self._stages,
                fingerprints=plan.fingerprints,
            )
            self._prune(progress.best_step)
        self._plan.backend.barrier()

    def _prune(self, best_step: int | None) -> None:
        section = self._plan.recipe.checkpoints
        checkpoints.prune(self._plan.output, section.keep, best_step if section.best else None)

    def finish(self, progress: Progress) -> None:
        """Writes the adapter (the best one where the recipe asks for it) and the plot."""
        if not self._main:
            return
        plan, values = self._plan, self._model.trainable()
        if plan.recipe.checkpoints.best and progress.best_step not in (None, progress.step):
            values = checkpoints.load(plan.output / f"checkpoint-{progress.best_step}").adapter
        write_adapter(plan.output / ADAPTER, plan.spec, values, plan.base_model, overwrite=True)
        plot_losses({"training": _curve(self.entries, "loss")}, plan.output / PLOT, plan.output.name, _held_out(self.entries))


def _curve(entries: Sequence[Entry], key: str) -> tuple[list[int], list[float]]:
    found = [(entry["step"], entry[key]) for entry in entries if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def _held_out(entries: Sequence[Entry]) -> dict[str, tuple[list[int], list[float]]]:
    curve = _curve(entries, "eval_loss")
    return {"held-out": curve} if curve[0] else {}


def result_of(plan: RunPlan, progress: Progress, entries: list[Entry]) -> RunResult:
    losses = _curve(entries, "loss")[1]
    evaluations = _curve(entries, "eval_loss")[1]
    return RunResult(
        steps=progress.step,
        first_loss=losses[0] if losses else float(np.nan),
        final_loss=losses[-1] if losses else float(np.nan),
        eval_loss=evaluations[-1] if evaluations else None,
        tokens=progress.tokens,
        seconds=progress.seconds,
        first_tokens=progress.first_tokens,
        first_seconds=progress.first_seconds,
        peak_memory=plan.backend.peak_memory(),
        on_host=plan.devices.platform == "cpu",
        output=plan.output,
        entries=entries,
    )
