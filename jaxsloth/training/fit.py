"""A recipe's flow around the training loop: what is logged, evaluated and saved when, and which step was the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jaxsloth.backend import Model, OptimizerOptions, Step
from jaxsloth.batch import Batch, StepBatch
from jaxsloth.data.step_batches import StepBatches
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.training.checkpoint import SavedRun
from jaxsloth.training.log import Entry
from jaxsloth.training.loop import Dispatched, Loop


class Callback(Protocol):
    """Who is told what happens. Every method gets the log entry or, for `on_save`, the step."""

    def on_log(self, entry: Entry) -> None: ...

    def on_evaluate(self, entry: Entry) -> None: ...

    def on_save(self, step: int) -> None: ...


@dataclass(frozen=True)
class FitOptions:
    """How a run goes. Steps count optimizer updates; learning_rate maps a step (from 0) to its rate. read_late: see `Loop`."""

    total_steps: int
    learning_rate: Callable[[int], float]
    optimizer: OptimizerOptions
    seed: int
    log_every: int = 1
    evaluate_every: int | None = None
    save_every: int | None = None
    save_best: bool = False
    stop_after: int | None = None
    read_late: bool = True


@dataclass(frozen=True)
class Progress:
    """Where a run stands, over all its parts. seconds: of training alone, without evaluations and saves; first_tokens and
    first_seconds: the share of each part's first step, which compiles."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_tokens: int = 0
    first_seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None


@dataclass
class Fit:
    """One run over a model, a `Flow`.

    save is called with the progress and the optimizer's state, and must write a checkpoint. `run` returns the last progress.
    """

    model: Model
    step_batches: StepBatches
    held_out: Sequence[Batch]
    options: FitOptions
    save_run: Callable[[Progress, dict[str, Any]], None]
    callbacks: Sequence[Callback] = ()
    progress: Progress = field(default_factory=Progress)

    def run(self, resume: SavedRun | None = None) -> Progress:
        """Trains up to total_steps, or to step stop_after; the last is evaluated and saved. Raises what `Loop.run` does."""
        self._step: Step = self.model.step(CausalLoss(), self.options.optimizer)
        if resume is not None:
            self._step.load_state(resume.optimizer)
        self._evaluate_step = self.model.eval_step() if self.held_out else None
        self._end = min(self.options.total_steps, self.options.stop_after or self.options.total_steps)
        self._begun, self._improved = self.progress, False
        self._done, self._tokens, seconds = self.progress.step, self.progress.tokens, self.progress.seconds
        self._mark = (self._tokens, seconds)
        self._loop = Loop(self, self.options.seed, read_late=self.options.read_late, seconds=seconds)
        self._loop.run(self._done)
        return self.progress

    def prepare(self, step: int) -> tuple[Step, StepBatch, float] | None:
        return None if step >= self._end else (self._step, self.step_batches.batch(step), self.options.learning_rate(step))

    def stepped(self, item: Dispatched) -> Iterator[None]:
        self._done, self._improved = item.step, False
        self._tokens += item.tokens
        yield

    def _due(self, every: int | None) -> bool:
        return self._done == self._end or (every is not None and self._done % every == 0)

    @property
    def logs(self) -> bool:
        return self._due(self.options.log_every)

    @property
    def evaluates(self) -> bool:
        return self._evaluate_step is not None and self._due(self.options.evaluate_every)

    @property
    def saves(self) -> bool:
        return self._due(self.options.save_every) or (self._improved and self.options.save_best)

    def log(self, items: Sequence[Dispatched]) -> None:
        """The last one's loss; the tokens since the log before by the time between their completions."""
        last = items[-1]
        speed = (self._tokens - self._mark[0]) / max(last.seconds - self._mark[1], 1e-9)
        self._mark = (self._tokens, last.seconds)
        entry: Entry = {
            "step": last.step,
            "loss": last.loss,
            "learning_rate": last.rate,
            "grad_norm": last.grad_norm,
            "tokens": self._tokens,
            "tokens_per_s": round(speed, 1),
            "seconds": round(last.seconds, 3),
        }
        if last.skipped:
            entry["skipped"] = True
        for callback in self.callbacks:
            callback.on_log(entry)

    def _advance(self) -> None:
        """Brings the progress up to the last step."""
        begun, first = self._begun, self._loop.first
        assert first is not None
        self.progress = replace(
            self.progress,
            step=self._done,
            tokens=self._tokens,
            seconds=self._loop.seconds,
            first_tokens=begun.first_tokens + first.tokens,
            first_seconds=begun.first_seconds + first.seconds - begun.seconds,
        )

    def evaluate(self) -> None:
        """Measures the held-out loss, summed over every target and divided by their count, and whether it is the lowest."""
        assert self._evaluate_step is not None
        totals = [self._evaluate_step(batch) for batch in self.held_out]
        count = sum(tokens for _, tokens in totals)
        loss, best = sum(float(total) for total, _ in totals) / max(count, 1), self.progress.best_loss
        self._improved = best is None or loss < best
        if self._improved:
            self.progress = replace(self.progress, best_step=self._done, best_loss=loss)
        for callback in self.callbacks:
            callback.on_evaluate({"step": self._done, "eval_loss": loss, "eval_tokens": count})

    def save(self) -> None:
        self._advance()
        self.save_run(self.progress, self._step.state())
        for callback in self.callbacks:
            callback.on_save(self._done)
