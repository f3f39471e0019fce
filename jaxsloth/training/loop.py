"""The training loop, shared by both backends: it hands windows to a train step and reads results only when it logs them.

A log entry's tokens_per_s is the tokens of the steps between two entries by the time between their completions: devices compute
while the host goes on, so a thread waits for results and notes the time (`completion`). Evaluations and saves wait for the step
before them and stop the clock; compiling counts for the step that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol

from jaxsloth.backend import Model, OptimizerOptions, Step, StepResult
from jaxsloth.batch import Batch, Window
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.training.checkpoint import SavedRun
from jaxsloth.training.completion import Completion, Completions
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
    """Where a run stands, over all its parts. seconds: of training alone, without evaluations and saves; first_tokens and
    first_seconds: the share of each part's first step, which compiles."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_tokens: int = 0
    first_seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None


class _Stopwatch:
    """Seconds of training, over a run's parts."""

    def __init__(self, before: float) -> None:
        self._before, self._start = before, perf_counter()

    def seconds(self, now: float) -> float:
        """Up to that moment, which is not before it last went on."""
        return self._before + now - self._start

    def stop(self) -> float:
        """Until it goes on; the seconds until now."""
        self._before = self.seconds(perf_counter())
        return self._before

    def go_on(self) -> None:
        self._start = perf_counter()


@dataclass
class _Dispatched:
    """A step that was handed to the device. tokens: of the run up to it; read: whether it has been waited for."""

    step: int
    result: StepResult
    rate: float
    tokens: int
    logged: bool
    completion: Completion | None
    read: bool = False


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
        step_function = self.model.step(CausalLoss(), self.options.optimizer)
        if resume is not None:
            step_function.load_state(resume.optimizer)
        self._evaluate_step = self.model.eval_step() if self.held_out else None
        end = min(self.options.total_steps, self.options.stop_after or self.options.total_steps)
        self._clock, self._starts = _Stopwatch(self.progress.seconds), True
        self._mark = (self.progress.tokens, self.progress.seconds)
        with Completions() as completions:
            self._steps(step_function, end, completions)
        return self.progress

    def _steps(self, step_function: Step, end: int, completions: Completions) -> None:
        tokens, last, options = self.progress.tokens, None, self.options
        for step in range(self.progress.step, end):
            window, rate = self.windows.window(step), options.learning_rate(step)
            result = step_function(window, learning_rate=rate, step=step, seed=options.seed)
            tokens += window.tokens
            done = step + 1
            saves, evaluates = self._due(options.save_every, done, end), self._due(options.evaluate_every, done, end)
            logged = done % options.log_every == 0 or done == end
            late = options.read_late and not (saves or evaluates)
            completion = completions.watch(result.wait) if late and (logged or last is None) else None
            if last is not None and (last.logged or self._starts):
                self._read(last)
            last = _Dispatched(done, result, rate, tokens, logged, completion)
            if saves or evaluates or ((logged or self._starts) and not options.read_late):
                self._read(last)
            if saves or evaluates:
                self._beside_training(last, step_function, saves, evaluates)

    @staticmethod
    def _due(every: int | None, done: int, end: int) -> bool:
        return done == end or (every is not None and done % every == 0)

    def _beside_training(self, last: _Dispatched, step_function: Step, saves: bool, evaluates: bool) -> None:
        """Evaluates and saves after a step that has been waited for."""
        self.progress = replace(self.progress, step=last.step, tokens=last.tokens, seconds=self._clock.stop())
        improved = evaluates and self._evaluate()
        if saves or (improved and self.options.save_best):
            self.save(self.progress, step_function.state())
            for callback in self.callbacks:
                callback.on_save(last.step)
        self._clock.go_on()

    def _read(self, item: _Dispatched) -> None:
        """Waits for a step, once, and logs it where it is to be logged."""
        if item.read:
            return
        item.read = True
        loss, grad_norm, skipped = item.result.floats()
        seen = item.completion.at if item.completion is not None else None
        seconds = self._clock.seconds(perf_counter() if seen is None else seen)
        if not math.isfinite(loss) and not skipped:
            raise NonFiniteLossError(
                f"the loss of step {item.step} is {loss}; lower the learning rate, or look at that step's rows. "
                "Checkpoints from before it are whole"
            )
        if self._starts:
            self._starts, before = False, self.progress
            first_tokens = before.first_tokens + item.tokens - before.tokens
            self.progress = replace(
                before, first_tokens=first_tokens, first_seconds=before.first_seconds + seconds - before.seconds
            )
        if item.logged:
            self._log(item, (loss, grad_norm, skipped), seconds)

    def _log(self, item: _Dispatched, result: tuple[float, float, bool], seconds: float) -> None:
        loss, grad_norm, skipped = result
        speed = (item.tokens - self._mark[0]) / max(seconds - self._mark[1], 1e-9)
        self._mark = (item.tokens, seconds)
        entry: Entry = {
            "step": item.step,
            "loss": loss,
            "learning_rate": item.rate,
            "grad_norm": grad_norm,
            "tokens": item.tokens,
            "tokens_per_s": round(speed, 1),
            "seconds": round(seconds, 3),
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
            self.progress = replace(self.progress, best_step=step, best_loss=loss)
        for callback in self.callbacks:
            callback.on_evaluate({"step": step, "eval_loss": loss, "eval_tokens": count})
        return improved
