"""The loop's decisions, over a model that only counts: when results are read, what is saved, evaluated and logged."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from jaxsloth.backend import OptimizerOptions, StepResult
from jaxsloth.batch import Batch, StepBatch
from jaxsloth.training.checkpoint import SavedRun, TrainerState
from jaxsloth.training.completion import Completion, Completions
from jaxsloth.training.fit import Fit, FitOptions, Progress
from jaxsloth.training.loop import NonFiniteLossError

OPTIONS = FitOptions(total_steps=6, learning_rate=lambda step: 0.1 * (step + 1), optimizer=OptimizerOptions(), seed=9)


class Unwatched:
    """Notes no times, and starts no thread that reads results."""

    def __enter__(self) -> Unwatched:
        return self

    def __exit__(self, *error: object) -> None: ...

    def watch(self, wait: Any) -> Completion:
        return Completion(wait)


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    monkeypatch.setattr("jaxsloth.training.loop.Completions", Unwatched)


@dataclass
class Scalar:
    """A value on a device: float() waits for it, and the journal says when."""

    value: float
    step: int
    journal: list[str]

    def __float__(self) -> float:
        self.journal.append(f"read {self.step}")
        return self.value


@dataclass
class Counting:
    """A model whose loss at step s (from 1) is losses[s], else 1/s; its held-out losses come from `held_out` in turn."""

    losses: dict[int, float] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    held_out: list[list[tuple[float, int]]] = field(default_factory=list)
    journal: list[str] = field(default_factory=list)
    seen: list[tuple[int, float, int, int]] = field(default_factory=list)
    loaded: Any = None

    def step(self, objective: Any, optimizer: OptimizerOptions) -> Any:
        return self

    def __call__(self, step_batch: StepBatch, *, learning_rate: float, step: int, seed: int) -> StepResult:
        done = step + 1
        self.journal.append(f"step {done}")
        self.seen.append((step, learning_rate, seed, int(step_batch.rows[0, 0])))
        loss = self.losses.get(done, 1.0 / done)
        return StepResult(Scalar(loss, done, self.journal), 0.5, float(done in self.skipped))

    def state(self) -> dict[str, np.ndarray]:
        return {"count": np.array(len(self.seen), np.int64)}

    def load_state(self, state: Any) -> None:
        self.loaded = state

    def eval_step(self) -> Any:
        turns = iter([pair for turn in self.held_out for pair in turn])
        return lambda batch: next(turns)


class Windows:
    """Step s has s + 1 tokens, and its row is named s."""

    def batch(self, step: int) -> StepBatch:
        ids = np.zeros((1, 1, 64), np.int32)
        segments = (np.arange(64) <= step).astype(np.int32)[None, None]
        return StepBatch(ids, ids, segments, ids, np.full((1, 1), step, np.int32), step + 1)


@dataclass
class Recorder:
    entries: list[dict[str, Any]] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)

    def on_log(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)

    on_evaluate = on_log

    def on_save(self, step: int) -> None:
        self.saves.append(step)


def fit(model: Counting, options: FitOptions, batches: int = 0, resume: SavedRun | None = None):
    recorder, saved = Recorder(), []
    ids = np.zeros((1, 8), np.int32)
    held_out = [Batch(ids, ids, ids, ids, np.zeros(1, np.int32))] * batches
    start = Progress() if resume is None else Progress(resume.state.step, resume.state.tokens, resume.state.seconds)

    def save(progress: Progress, state: dict[str, np.ndarray]) -> None:
        saved.append((progress, int(state["count"])))

    loop = Fit(model, Windows(), held_out, options, save, [recorder], start)  # type: ignore[arg-type]
    return loop.run(resume), recorder, saved


class VirtualDevice(Counting):
    """A device that computes a step at a time, behind the host's back, in a time of its own: handing over step s takes
    host[s] seconds (default 1 ms), computing it device[s], an evaluation of a batch 0.7 s."""

    def __init__(self, device: dict[int, float], host: dict[int, float] | None = None) -> None:
        super().__init__()
        self.now = self.free = 0.0
        self.device, self.host = device, host or {}

    def __call__(self, step_batch: StepBatch, *, learning_rate: float, step: int, seed: int) -> StepResult:
        done = step + 1
        self.now += self.host.get(done, 1e-3)
        self.free = max(self.free, self.now) + self.device[done]
        return StepResult(None, None, None, Pending(self, self.free, 1.0 / done))

    def eval_step(self) -> Any:
        def evaluate(batch: Batch) -> tuple[float, int]:
            self.now = max(self.now, self.free) + 0.7
            return 2.0, 1

        return evaluate


@dataclass
class Pending:
    device: VirtualDevice
    ready: float
    loss: float

    def block_until_ready(self) -> None:
        self.device.now = max(self.device.now, self.ready)

    def tolist(self) -> list[float]:
        self.block_until_ready()
        return [self.loss, 0.5, 0.0]


class Virtual(Unwatched):
    """What the thread would note, in the device's time."""

    def watch(self, wait: Any) -> Any:
        result = wait.__self__.scalars

        class Seen:
            at = property(lambda self: result.ready if result.ready <= result.device.now else None)

        return Seen()


@pytest.fixture
def virtual(monkeypatch):
    """Runs the loop over a `VirtualDevice`, with saves of 1.3 s: (the last progress, the training entries)."""

    def run(model: VirtualDevice, options: FitOptions, start: Progress = Progress()):  # noqa: B008
        monkeypatch.setattr("jaxsloth.training.loop.perf_counter", lambda: model.now)
        monkeypatch.setattr("jaxsloth.training.loop.Completions", Virtual)
        recorder, ids = Recorder(), np.zeros((1, 8), np.int32)

        def save(progress: Progress, state: dict[str, np.ndarray]) -> None:
            model.now += 1.3

        held_out = [Batch(ids, ids, ids, ids, np.zeros(1, np.int32))]
        progress = Fit(model, Windows(), held_out, options, save, [recorder], start).run()  # type: ignore[arg-type]
        return progress, [entry for entry in recorder.entries if "loss" in entry]

    return run


TIMES = {step: 0.2 + 0.05 * (step % 4) for step in range(1, 41)}  # s of step, much more than what handing it over takes


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(("evaluate_every", "save_every"), [(None, None), (3, None), (4, 5)])
@pytest.mark.parametrize("log_every", [1, 2, 10])
def test_tokens_per_s_are_the_device_s(virtual, log_every, evaluate_every, save_every, late):
    """Each record within 3 % of its steps' tokens by the time that they take on the device, whatever comes between."""
    options = replace(
        OPTIONS, total_steps=34, log_every=log_every, evaluate_every=evaluate_every, save_every=save_every, read_late=late
    )
    progress, entries = virtual(VirtualDevice(TIMES), options)
    assert [entry["step"] for entry in entries] == [*range(log_every, 34, log_every), 34]
    before = 0
    for entry in entries:
        steps = range(before + 1, entry["step"] + 1)
        true = sum(steps) / sum(TIMES[step] for step in steps)  # step s has s tokens
        assert entry["tokens_per_s"] == pytest.approx(true, rel=0.03), entry
        before = entry["step"]
    assert progress.seconds == pytest.approx(sum(TIMES[s] for s in range(1, 35)), rel=0.03)
    assert (progress.first_tokens, progress.first_seconds) == (1, pytest.approx(TIMES[1], rel=0.03))


def test_compiling_counts_for_the_step_that_needs_it(virtual):
    """The first step compiles for 20 s, the third for 5."""
    model = VirtualDevice(TIMES, host={1: 20.0, 3: 5.0})
    progress, entries = virtual(model, replace(OPTIONS, total_steps=4))
    expected = [1 / (20 + TIMES[1]), 2 / TIMES[2], 3 / 5, 4 / TIMES[4]]
    # While the third compiles, the second is computed.
    expected[2] = 3 / (5 + TIMES[3] - TIMES[2])
    assert [entry["tokens_per_s"] for entry in entries] == [pytest.approx(true, rel=0.03, abs=0.05) for true in expected]
    assert progress.first_seconds == pytest.approx(20 + TIMES[1], rel=0.03)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_host_that_is_slower_than_the_device_is_what_counts(virtual, log_every):
    """Steps of 0.3 s on the host and 0.005 s on the device; whatever is saved between."""
    model = VirtualDevice(dict.fromkeys(TIMES, 0.005), host=dict.fromkeys(TIMES, 0.3))
    _, entries = virtual(model, replace(OPTIONS, total_steps=22, save_every=6, log_every=log_every))
    before = 0
    for entry in entries:
        steps = range(before + 1, entry["step"] + 1)
        assert entry["tokens_per_s"] == pytest.approx(sum(steps) / (0.3 * len(steps)), rel=0.03), entry
        before = entry["step"]


def test_speeds_of_a_part_that_is_stopped_and_of_the_one_that_goes_on(virtual):
    progress, entries = virtual(VirtualDevice(TIMES, {1: 9.0}), replace(OPTIONS, total_steps=30, stop_after=7))
    ended, more = virtual(VirtualDevice(TIMES, {8: 5.0}), replace(OPTIONS, total_steps=30), progress)
    assert [entry["step"] for entry in entries + more] == list(range(1, 31))
    for entry in entries + more:
        compiling = {1: 9.0, 8: 5.0}.get(entry["step"], 0.0)
        true = entry["step"] / (compiling + TIMES[entry["step"]])
        assert entry["tokens_per_s"] == pytest.approx(true, rel=0.03, abs=0.05), entry
    assert ended.seconds == pytest.approx(14.0 + sum(TIMES[s] for s in range(1, 31)), rel=0.03)
    assert ended.first_tokens == 1 + 8
    assert ended.first_seconds == pytest.approx(14.0 + TIMES[1] + TIMES[8], rel=0.03)


def test_a_thread_notes_completions_while_the_host_is_busy():
    ready = []

    def wait():
        time.sleep(0.05)
        ready.append(time.perf_counter())

    def fail():
        raise RuntimeError("the device is gone")

    with Completions() as completions:
        seen = [completions.watch(wait), completions.watch(fail), completions.watch(wait)]
        assert [one.at for one in seen] == [None] * 3
        time.sleep(0.4)
    assert seen[1].at is None
    assert [seen[0].at, seen[2].at] == pytest.approx(ready, abs=0.02)


def test_every_step_gets_its_window_rate_and_seed():
    model = Counting()
    progress, recorder, saved = fit(model, OPTIONS)
    assert model.seen == [(s, pytest.approx(0.1 * (s + 1)), 9, s) for s in range(6)]
    assert [(e["step"], e["loss"], e["tokens"]) for e in recorder.entries] == [
        (s, 1 / s, s * (s + 1) // 2) for s in range(1, 7)
    ]
    assert (progress.step, progress.tokens) == (6, 21)
    assert [p.step for p, _ in saved] == recorder.saves == [6]


def test_a_result_is_read_only_after_the_next_step_was_dispatched():
    model = Counting()
    fit(model, replace(OPTIONS, total_steps=3))
    assert model.journal == ["step 1", "step 2", "read 1", "step 3", "read 2", "read 3"]


def test_results_are_read_where_one_is_logged():
    """But for the first, which says how long compiling took."""
    model = Counting()
    _, recorder, _ = fit(model, replace(OPTIONS, total_steps=7, log_every=3))
    assert [e["step"] for e in recorder.entries] == [3, 6, 7]
    waits = "step 1|step 2|read 1|step 3|step 4|read 2|read 3|step 5|step 6|step 7|read 4|read 5|read 6|read 7"
    assert model.journal == waits.split("|")


def test_a_loss_that_is_not_finite_names_its_step_though_a_later_one_is_logged():
    with pytest.raises(NonFiniteLossError, match="step 4 is nan"):
        fit(Counting(losses={4: float("nan")}), replace(OPTIONS, log_every=6))


def test_everything_up_to_a_checkpoint_is_logged_before_it_is_written():
    recorder = Recorder()
    logged = []
    loop = Fit(
        Counting(),  # type: ignore[arg-type]
        Windows(),
        [],
        replace(OPTIONS, save_every=2),
        lambda progress, state: logged.append((progress.step, [e["step"] for e in recorder.entries])),
        [recorder],
    )
    loop.run()
    assert logged == [(2, [1, 2]), (4, [1, 2, 3, 4]), (6, [1, 2, 3, 4, 5, 6])]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("late", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(loss, late):
    with pytest.raises(NonFiniteLossError, match=r"step 4 is (nan|inf)"):
        fit(Counting(losses={4: loss}), replace(OPTIONS, read_late=late))


def test_a_step_that_fp16_skipped_may_overflow():
    _, recorder, _ = fit(Counting(losses={4: float("inf")}, skipped=frozenset({4})), OPTIONS)
    assert [e["step"] for e in recorder.entries if e.get("skipped")] == [4]
    assert len(recorder.entries) == 6


def test_the_held_out_loss_is_over_tokens_not_over_batches():
    model = Counting(held_out=[[(30.0, 10), (1.0, 1)], [(11.0, 10), (0.0, 1)]])
    _, recorder, _ = fit(model, replace(OPTIONS, total_steps=4, evaluate_every=2), batches=2)
    found = [(e["step"], e["eval_loss"], e["eval_tokens"]) for e in recorder.entries if "eval_loss" in e]
    assert found == [(2, 31 / 11, 11), (4, 1.0, 11)]


def test_the_best_is_saved_when_it_is_met():
    model = Counting(held_out=[[(3.0, 1)], [(1.0, 1)], [(2.0, 1)]])
    progress, _, saved = fit(model, replace(OPTIONS, evaluate_every=2, save_best=True), batches=1)
    assert [(p.step, p.best_step, p.best_loss) for p, _ in saved] == [(2, 2, 3.0), (4, 4, 1.0), (6, 4, 1.0)]
    assert (progress.best_step, progress.best_loss) == (4, 1.0)


def test_it_stops_where_it_is_told_with_the_whole_run_s_rates_and_goes_on_from_there():
    model = Counting()
    progress, _, saved = fit(model, replace(OPTIONS, stop_after=4))
    assert [p.step for p, _ in saved] == [4]
    state = TrainerState(progress.step, "torch", {}, progress.tokens, 100.0)
    again = Counting()
    resumed, recorder, _ = fit(again, OPTIONS, resume=SavedRun(state, {}, {"count": np.array(4)}, None, None))  # type: ignore[arg-type]
    assert again.loaded == {"count": np.array(4)}
    assert again.seen == [(s, pytest.approx(0.1 * (s + 1)), 9, s) for s in (4, 5)]
    assert (resumed.step, resumed.tokens) == (6, 21)
    assert all(entry["seconds"] >= 100.0 for entry in recorder.entries)
