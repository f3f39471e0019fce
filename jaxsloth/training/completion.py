"""When a device was done with a step, whatever the host was doing at that moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Self


class Completion:
    """at: when it was seen, by `perf_counter`; None until then."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait = wait
        self.at: float | None = None


class Completions:
    """A thread that waits for one result after the other. The host reads a result when it comes to it, which may be long after:
    it hands over the next step first, and that may compile."""

    def __enter__(self) -> Self:
        self._queue: SimpleQueue[Completion | None] = SimpleQueue()
        Thread(target=self._run, name="jaxsloth-completions", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)

    def watch(self, wait: Callable[[], object]) -> Completion:
        """wait: returns when the result is there, and may be called in a thread."""
        completion = Completion(wait)
        self._queue.put(completion)
        return completion

    def _run(self) -> None:
        while (completion := self._queue.get()) is not None:
            with suppress(Exception):  # a device's error is raised where the result is read
                completion.wait()
                completion.at = perf_counter()
