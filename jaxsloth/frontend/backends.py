"""Which backend the front end uses, and what its device has room for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from jaxsloth.backend import BACKENDS, Backend
from jaxsloth.training.run import choose_backend

VARIABLE = "JAXSLOTH_BACKEND"
_AUTOMATIC = "auto"
_chosen: dict[str, str | None] = {"set": None, "used": None}


def set_backend(name: str | None) -> None:
    """The backend of models loaded from now on, where neither ``backend=`` nor JAXSLOTH_BACKEND names one; None: automatic."""
    _chosen["set"] = None if name is None else _checked(name, "set_backend")


def resolve_backend(argument: str | None = None) -> Backend:
    """``backend=`` > JAXSLOTH_BACKEND > `set_backend` > the one that sees an accelerator (JAX when both or neither do).

    Raises:
        ValueError: there is no backend of that name; the message says who asked for it.
    """
    if argument is not None:
        name = _checked(argument, "the argument backend")
    elif os.environ.get(VARIABLE):
        name = _checked(os.environ[VARIABLE], f"the environment variable {VARIABLE}")
    else:
        name = _chosen["set"] or _AUTOMATIC
    return choose_backend(name)


def remember(backend: Backend) -> None:
    """A model was loaded on it: `memory_stats` speaks of its device."""
    _chosen["used"] = backend.name


def _checked(name: str, origin: str) -> str:
    if name not in (*BACKENDS, _AUTOMATIC):
        raise ValueError(f"backend must be one of {[*BACKENDS, _AUTOMATIC]}, and {origin} is {name!r}")
    return name


@dataclass(frozen=True)
class MemoryStats:
    """Of one device: total_bytes, and the peak that this process had in use (of the host on a CPU: its resident set)."""

    backend: str
    device: str
    total_bytes: int
    peak_bytes: int

    @property
    def total_gib(self) -> float:
        return round(self.total_bytes / 2**30, 3)

    @property
    def peak_gib(self) -> float:
        return round(self.peak_bytes / 2**30, 3)


def memory_stats(backend: str | None = None) -> MemoryStats:
    """What scripts ask torch.cuda for (get_device_properties, max_memory_reserved), on whichever backend a model was loaded
    last; before any, on the one that would be."""
    engine = resolve_backend(backend or _chosen["used"])
    found = engine.devices()
    total = found.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MemoryStats(engine.name, found.name, total, engine.peak_memory() or 0)
