"""What a run shows while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxsloth.training.log import Entry

_LINES = 20  # how many lines a run prints where there is no terminal to draw a bar on
_ALL = 1e9  # seconds that the time left is estimated from: with rich's 30, steps that take longer have none


class ProgressBar:
    """A bar with loss, tokens/s and the time left on a terminal; elsewhere a line every twentieth of the run.

    last_step: where this part of the run ends, which the time left is counted to.
    """

    def __init__(self, console: Console, total_steps: int, first_step: int, last_step: int | None = None) -> None:
        self._console = console
        self._total = total_steps
        self._last = total_steps if last_step is None else last_step
        self._every = max(1, total_steps // _LINES)
        self._shown = first_step  # the last step that a line was printed of
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=_ALL,
            )
            self._task = self._bar.add_task("training", total=self._last, completed=first_step, shown="compiling")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        del kind, error, traceback
        if self._bar is not None:
            self._bar.stop()

    def on_log(self, entry: Entry) -> None:
        shown = f"loss {entry['loss']:.4f}  {entry['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=entry["step"], shown=shown)
        elif entry["step"] // self._every > self._shown // self._every or entry["step"] in (1, self._last):
            self._shown = entry["step"]
            self._console.print(f"step {entry['step']}/{self._total}  {shown}")

    def on_evaluate(self, entry: Entry) -> None:
        self._console.print(f"step {entry['step']}/{self._total}  held-out loss {entry['eval_loss']:.4f}")
