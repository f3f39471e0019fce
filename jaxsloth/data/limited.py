"""Running what others wrote (chat templates) for a limited time, and seeing beforehand what could not be stopped."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes

SECONDS = 5.0  # of the thread's own time; a row takes a millisecond
MEMORY = 1 << 30  # that the process may grow by while a template runs
CHARACTERS = 1 << 26
_LARGEST_FACTOR = 10_000
_POLL = 0.05
_ELSEWHERE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class TemplateLimitError(Exception):
    """A template that does not end, or that grows beyond reason."""


class _OverrunError(BaseException):
    """Thrown into the thread that took too long; no handler of Exception catches it."""


def check_template(source: str) -> None:
    """That a template asks for nothing that could not be stopped while it runs: other files, and products without end.

    Raises:
        TemplateLimitError: it does.
        jinja2.TemplateError: it does not parse.
    """
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_without_generation_tags(source))
    except RecursionError:
        raise TemplateLimitError("it is nested too deeply") from None
    for node in tree.find_all(_ELSEWHERE):
        raise TemplateLimitError(f"line {node.lineno}: {type(node).__name__.lower()} asks for another file, and there is none")
    for node in tree.find_all(nodes.Pow):
        raise TemplateLimitError(f"line {node.lineno}: ** can make numbers of any size")
    for node in tree.find_all(nodes.Mul):
        if any(_is_large(part) for part in (node.left, node.right)):
            raise TemplateLimitError(f"line {node.lineno}: * with a factor above {_LARGEST_FACTOR}, or of a product")


def _without_generation_tags(source: str) -> str:
    """transformers' own tag, which plain jinja2 does not know."""
    for tag in ("generation", "endgeneration"):
        for left in ("{%", "{%-", "{%+"):
            for right in ("%}", "-%}", "+%}"):
                for inside in (f" {tag} ", tag, f" {tag}", f"{tag} "):
                    source = source.replace(f"{left}{inside}{right}", "")
    return source


def _is_large(node: nodes.Expr) -> bool:
    if isinstance(node, nodes.Mul):
        return True
    return isinstance(node, nodes.Const) and isinstance(node.value, int | float) and abs(node.value) > _LARGEST_FACTOR


@dataclass
class _Job:
    thread: int
    end: float
    clock: Callable[[], float]
    memory: int
    fired: str | None = None


class _Watchdog:
    """One thread for all renderings, asleep while there is none."""

    def __init__(self) -> None:
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._jobs: list[_Job] = []
        self._started = False

    def begin(self) -> _Job:
        clock = _clock_of(threading.get_ident())
        job = _Job(threading.get_ident(), clock() + SECONDS, clock, _resident() + MEMORY)
        with self._lock:
            self._jobs.append(job)
            if not self._started:
                threading.Thread(target=self._watch, name="jaxsloth-templates", daemon=True).start()
                self._started = True
        self._wake.set()
        return job

    def finish(self, job: _Job) -> None:
        with self._lock:
            self._jobs.remove(job)
            if not self._jobs:
                self._wake.clear()
            if job.fired is not None:  # perhaps not delivered yet: it must not be, later and elsewhere
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(job.thread), None)

    def _watch(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(_POLL)
            with self._lock:
                for job in self._jobs:
                    if job.fired is None:
                        self._look(job)

    @staticmethod
    def _look(job: _Job) -> None:
        if job.clock() > job.end:
            job.fired = f"it ran for more than {SECONDS:g} s"
        elif _resident() > job.memory:
            job.fired = f"it took more than {MEMORY >> 20} MiB of memory"
        if job.fired is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(job.thread), ctypes.py_object(_OverrunError))


def _clock_of(thread: int) -> Callable[[], float]:
    """The time that a thread has computed for; where the system can't tell, the time that has passed."""
    if hasattr(time, "pthread_getcpuclockid"):
        number = time.pthread_getcpuclockid(thread)
        return lambda: time.clock_gettime(number)
    return time.monotonic


def _resident() -> int:
    """The process' memory in bytes; 0 where the system can't tell."""
    with suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
    return 0


_WATCHDOG = _Watchdog()


@contextmanager
def limited() -> Iterator[None]:
    """A block that is stopped where it computes for more than SECONDS, or the process grows by more than MEMORY.

    Raises:
        TemplateLimitError: it was.
    """
    job = _WATCHDOG.begin()
    try:
        try:
            yield
        finally:
            _WATCHDOG.finish(job)
    except (_OverrunError, MemoryError):
        raise TemplateLimitError(job.fired or "it took more memory than there is") from None


def check_size(text: Any) -> Any:
    """A rendered text; TemplateLimitError where it is too long."""
    if isinstance(text, str) and len(text) > CHARACTERS:
        raise TemplateLimitError(f"it wrote {len(text)} characters, and at most {CHARACTERS} are allowed")
    return text
