"""How many programs XLA has compiled, as jax.monitoring tells it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jax import monitoring

# Told once a program that XLA compiles or that comes from jax's cache on disk.
_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Counts those of the process while `counting` runs."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        before = _told[0]
        try:
            yield
        finally:
            self.count += _told[0] - before


_told = [0]


def _listen(event: str, duration_secs: float, **details: str | int) -> None:
    del duration_secs, details
    _told[0] += event == _EVENT


monitoring.register_event_duration_secs_listener(_listen)
