"""The training loop, shared by both backends: it hands windows to a train step and reads results only when it logs them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxsloth.backend import Model, OptimizerOptions, StepResult
from jaxsloth.batch import Batch, Window
from jaxsloth.training.checkpoint import SavedRun
from jaxsloth.training.log import Entry


class Callback(Protocol):
    """Who is told what happens. Every method gets the log entry or, for `on_save`, the step."""

    def on_log(self, entry: Entry) -> None: ...

    def on_evaluate(self, entry: Entry) -> None: ...

    def on_save(self, step: int) -> None: ...


class Windows(Protocol):
    """Random access to the windows of a run."""

    def window(self, step: int) -> Window: ...


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite: nothing after it can be right."""


@dataclass(frozen=True)
class FitOptions:
    """How the loop runs. Steps count optimizer updates; learning_rate maps a step (from 0) to its rate.

    read_late: a step's result is read when the next step has been handed to the device, which then never waits for the host;
    of no use where computing is synchronous (CPU).
    """

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
    """Where a run stands. seconds counts training time over all its parts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None


@dataclass
class _Pending:
    """A dispatched step whose result has not been read."""

    step: int
    result: StepResult
    rate: float
    tokens: int


@dataclass
class Fit:
    """One run of the loop over a model.

    save is called with the progress and the optimizer's state, and must write a checkpoint. `run` returns the last progress.
    """

    model: Model
    windows: Windows
    held_out: Sequence[Batch]
    options: FitOptions
    save: Callable[[Progress, dict[str, Any]], None]
    callbacks: Sequence[Callback] = ()
    progress: Progress = field(default_factory=Progress)

    def run(self, resume: SavedRun | None = None) -> Progress:
        """Trains up to total_steps, or to step stop_after; the last step is evaluated and saved.

        Raises:
            NonFiniteLossError: a step's loss is NaN or infinite; the checkpoints before it stay.
        """
        step_function = self.model.train_step(self.options.optimizer)
        if resume is not None:
            step_function.load_state(resume.optimizer)
        self._evaluate_step = self.model.eval_step() if self.held_out else None
        end = min(self.options.total_steps, self.options.stop_after or self.options.total_steps)
        pending: list[_Pending] = []
        tokens, self._start, self._before = self.progress.tokens, time.perf_counter(), self.progress.seconds
        self._mark = (tokens, self._start)
        for step in range(self.progress.step, end):
            window = self.windows.window(step)
            rate = self.options.learning_rate(step)
            result = step_function(window, learning_rate=rate, step=step, seed=self.options.seed)
            tokens += window.tokens
            done = step + 1
            saves, evaluates = self._due(self.options.save_every, done, end), self._due(self.options.evaluate_every, done, end)
            if done % self.options.log_every == 0 or done == end:
                self._read(pending)
                pending = [_Pending(done, result, rate, tokens)]
            if saves or evaluates or not self.options.read_late:
                self._read(pending)
                pending = []
            if saves or evaluates:
                self._advance(done, tokens)
            improved = evaluates and self._evaluate()
            if saves or (improved and self.options.save_best):
                self.save(self.progress, step_function.state())
                for callback in self.callbacks:
                    callback.on_save(done)
        self._read(pending)
        return self.progress

    @staticmethod
    def _due(every: int | None, done: int, end: int) -> bool:
        return done == end or (every is not None and done % every == 0)

    def _advance(self, step: int, tokens: int) -> None:
        seconds = self._before + time.perf_counter() - self._start
        self.progress = Progress(step, tokens, seconds, self.progress.best_step, self.progress.best_loss)

    def _read(self, pending: Sequence[_Pending]) -> None:
        """Waits for results and logs them."""
        for item in pending:
            loss, grad_norm, skipped = item.result.floats()
            if not math.isfinite(loss) and not skipped:
                raise NonFiniteLossError(
                    f"the loss of step {item.step} is {loss}; lower the learning rate, or look at that step's rows. "
                    "Checkpoints from before it are whole"
                )
            now = time.perf_counter()
            speed = (item.tokens - self._mark[0]) / max(now - self._mark[1], 1e-9)
            self._mark = (item.tokens, now)
            entry: Entry = {
                "step": item.step,
                "loss": loss,
                "learning_rate": item.rate,
                "grad_norm": grad_norm,
                "tokens": item.tokens,
                "tokens_per_s": round(speed, 1),
                "seconds": round(self._before + now - self._start, 3),
            }
            if skipped:
                entry["skipped"] = True
            for callback in self.callbacks:
                callback.on_log(entry)

    def _evaluate(self) -> bool:
        """Measures the held-out loss, summed over every target and divided by their count; whether it is the lowest so far."""
        if self._evaluate_step is None:
            return False
        totals = [self._evaluate_step(batch) for batch in self.held_out]
        count = sum(tokens for _, tokens in totals)
        loss = sum(float(total) for total, _ in totals) / max(count, 1)
        step, best = self.progress.step, self.progress.best_loss
        improved = best is None or loss < best
        if improved:
            self.progress = Progress(step, self.progress.tokens, self.progress.seconds, step, loss)
        for callback in self.callbacks:
            callback.on_evaluate({"step": step, "eval_loss": loss, "eval_tokens": count})
        return improved
