"""The training loop under every door: it hands a run's batches to its step, and reads results only when they are needed.

What surrounds the steps is a `Flow`: a recipe's run (`fit`), or a trainer's, with transformers' callbacks. Devices compute
while the host goes on, so a thread waits for results and notes the time (`completion`). Evaluations and saves wait for the step
before them and stop the clock; compiling counts for the step that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from jaxsloth.backend import Step, StepResult
from jaxsloth.batch import StepBatch
from jaxsloth.training.completion import Completion, Completions


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite: nothing after it can be right."""


@dataclass
class Dispatched:
    """A step that was handed to the device. step: counted from 1; tokens: of its batch. What follows `completion` is known once
    it is read; seconds: of training, when it was done."""

    step: int
    result: StepResult
    rate: float
    tokens: int
    completion: Completion | None = None
    seconds: float = 0.0
    loss: float = math.nan
    grad_norm: float = math.nan
    skipped: bool = False

    def read(self, clock: Stopwatch) -> None:
        """Waits for the device.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite, and fp16 did not skip the step for it.
        """
        self.loss, self.grad_norm, self.skipped = self.result.floats()
        seen = self.completion.at if self.completion is not None else None
        self.seconds = clock.seconds(perf_counter() if seen is None else seen)
        if not math.isfinite(self.loss) and not self.skipped:
            raise NonFiniteLossError(
                f"the loss of step {self.step} is {self.loss}; lower the learning rate, or look at that step's rows. "
                "Checkpoints from before it are whole"
            )


class Flow(Protocol):
    """What surrounds the steps of a run. logs, evaluates and saves: what is due after the step that was handed over last; they
    are asked for again after each of them, since one may lead to another."""

    @property
    def logs(self) -> bool: ...

    @property
    def evaluates(self) -> bool: ...

    @property
    def saves(self) -> bool: ...

    def prepare(self, step: int) -> tuple[Step, StepBatch, float] | None:
        """(what steps, its batch, its learning rate) of a step counted from 0; None where the run is over."""
        ...

    def stepped(self, item: Dispatched) -> Iterator[None]:
        """Takes note of a step that was handed to the device; yields wherever something may be due."""
        ...

    def log(self, items: Sequence[Dispatched]) -> None:
        """Logs the steps since the last log, all of them read."""
        ...

    def evaluate(self) -> None: ...

    def save(self) -> None: ...


class Stopwatch:
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


class Loop:
    """One run of a flow.

    read_late: a step that is only to be logged is read when the next one has been handed over, so that the device never waits
    for the host; of no use where computing is synchronous (CPU). seconds: of training in the run's earlier parts, and later
    those at the last evaluation or save. first: the first step, which compiles, once it is read. unlogged: the steps that were
    read since the last log.
    """

    def __init__(self, flow: Flow, seed: int, *, read_late: bool = False, seconds: float = 0.0) -> None:
        self._flow, self._seed, self._late = flow, seed, read_late
        self._clock, self.seconds = Stopwatch(seconds), seconds
        self._pending: list[Dispatched] = []
        self._put_off: bool | None = None  # the pending steps are to be read when the next is on its way, and logged or not
        self.unlogged: list[Dispatched] = []
        self.first: Dispatched | None = None

    def run(self, step: int) -> None:
        """Trains from a step (counted from 0) until the flow ends it; NonFiniteLossError where a loss is not finite."""
        with Completions() if self._late else nullcontext() as completions:
            while (work := self._flow.prepare(step)) is not None:
                function, step_batch, rate = work
                result = function(step_batch, learning_rate=rate, step=step, seed=self._seed)
                completion = None if completions is None else completions.watch(result.wait)
                step += 1
                item = Dispatched(step, result, rate, step_batch.tokens, completion)
                if self._put_off is not None:
                    self._settle(self._put_off)
                self._pending.append(item)
                for _ in self._flow.stepped(item):
                    self._act()
            self._settle(bool(self._put_off))

    def _act(self) -> None:
        """Does what is due, or puts it off."""
        flow = self._flow
        logs, waits = flow.logs, self._late and not (flow.evaluates or flow.saves)
        if waits and (logs or self.first is None):
            self._put_off = logs
        elif logs or self.first is None:
            self._settle(logs)
        if flow.evaluates or flow.saves:
            self._settle(False)
            self.seconds = self._clock.stop()
            if flow.evaluates:
                flow.evaluate()
            if flow.saves:
                flow.save()
            self._clock.go_on()

    def _settle(self, logs: bool) -> None:
        """Waits for the steps that were handed over."""
        self._put_off = None
        for item in self._pending:
            item.read(self._clock)
        self.unlogged += self._pending
        self.first = self.first or next(iter(self.unlogged), None)
        self._pending = []
        if logs:
            done, self.unlogged = self.unlogged, []
            self._flow.log(done)
