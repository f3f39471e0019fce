"""Which implementation of an op runs, and why the others do not.

An op is one mathematical function with one signature; its implementations live in the op's folder
(``torch_ops``, ``triton_kernel``, ``xla_ops``, ``pallas_kernel``) and are named here by import path, so that
looking one up imports no framework. `select` walks an op's implementations in order of preference and returns
the first that does not refuse; a refusal is a sentence that a user can read.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import takewhile
from types import MappingProxyType, ModuleType
from typing import Any, Literal

logger = logging.getLogger("jaxsloth.kernels")

BackendName = Literal["torch", "jax"]
Platform = Literal["cpu", "cuda", "tpu"]


@dataclass(frozen=True)
class Target:
    """What an implementation may decide on: where it would run, on what dtype, and sizes named by the op's contract."""

    platform: Platform
    dtype: str = "float32"
    sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def __hash__(self) -> int:
        return hash((self.platform, self.dtype, tuple(sorted(self.sizes.items()))))


def always(target: Target) -> str | None:
    """Refuses nothing."""
    del target
    return None


def needs_cuda(target: Target) -> str | None:
    return None if target.platform == "cuda" else f"needs an NVIDIA GPU, and the arrays are on {target.platform}"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `path` is ``module:function``; `refuses` returns the reason why it can't run, or None."""

    name: str
    backend: BackendName
    path: str
    refuses: Callable[[Target], str | None] = always

    def module(self) -> ModuleType:
        """Where it is defined, beside functions that do the same on buffers of a caller's."""
        return import_module(self.path.partition(":")[0])

    def load(self) -> Callable[..., Any]:
        return getattr(self.module(), self.path.partition(":")[2])


@dataclass(frozen=True)
class Op:
    """A function and its implementations, the preferred first. The last of each backend runs everywhere."""

    name: str
    implementations: tuple[Implementation, ...]

    def of(self, backend: BackendName) -> tuple[Implementation, ...]:
        return tuple(i for i in self.implementations if i.backend == backend)


@dataclass(frozen=True)
class Choice:
    """What `select` decided: the implementation, and (name, reason) of every one preferred to it that refused."""

    implementation: Implementation
    refused: tuple[tuple[str, str], ...]


class RefusedError(RuntimeError):
    """An implementation that was asked for by name can't run here."""


@cache
def select(op: Op, backend: BackendName, target: Target, requested: str | None = None) -> Choice:
    """The implementation of `op` to use for `target`.

    Args:
        requested: an implementation's name; then it runs or `RefusedError` says why not. None chooses the first
            that does not refuse; which preferred ones refused is logged for who debugs.
    """
    candidates = {implementation.name: implementation for implementation in op.of(backend)}
    reasons = {name: implementation.refuses(target) for name, implementation in candidates.items()}
    chosen = choose_named(op.name, backend, requested, reasons)
    return Choice(candidates[chosen], () if requested is not None else _preferred(reasons))


def choose_named(name: str, backend: BackendName, requested: str | None, reasons: Mapping[str, str | None]) -> str:
    """`select` by names alone, for ops and for `WHOLE_PASSES`: the implementation of `name` that runs.

    Args:
        requested: as in `select`.
        reasons: of every implementation, the preferred first: why it can't run, or None.

    Raises:
        RefusedError: there is none of the requested name, or it can't run; without a request: none can.
    """
    if requested is not None:
        if requested not in reasons:
            raise RefusedError(f"op {name} has no implementation {requested!r} for {backend}; it has: {', '.join(reasons)}")
        if reasons[requested] is not None:
            raise RefusedError(f"op {name}: the implementation {requested!r} can't run here: it {reasons[requested]}")
        return requested
    chosen = next((one for one, reason in reasons.items() if reason is None), None)
    if chosen is None:
        raise RefusedError(f"op {name} has no implementation for {backend} that can run: {list(reasons.items())}")
    refused = _preferred(reasons)
    if refused:
        why = "; ".join(f"{one} {reason}" for one, reason in refused)
        logger.debug("op %s on %s uses %s (%s)", name, backend, chosen, why)
    return chosen


# How whole passes are put together: the name of the way that is written for NVIDIA GPUs, then of the one made of ops.
WAYS = {"train_pass": ("written", "autograd"), "decode_step": ("fused", "composed")}
# Names of earlier days that a request may still have.
_EARLIER = {"train_pass": {"fused": "written", "composed": "autograd"}}


def written_by_itself(platform: str) -> str | None:
    """Why a written pass isn't taken there unless it is asked for, or None."""
    return None if platform == "cuda" else "is made for NVIDIA GPUs, and runs elsewhere when asked for by name"


def today_of(name: str, requested: str | None) -> str | None:
    """A request under its name of today."""
    return _EARLIER.get(name, {}).get(requested or "", requested)


def way_asked_for(name: str, requested: str | None) -> str | None:
    """The way of a whole pass that a request means: itself, or today's name of it, which is said once."""
    today = today_of(name, requested)
    if today != requested:
        _say_once(f"implementations: {{{name}: {requested}}} is called {today} now")
    return today


def choose_written(name: str, backend: BackendName, requested: str | None, reason: str | None, platform: str) -> bool:
    """Whether the first of the `WAYS` of a whole pass runs. reason: why it can't. A run says once which training pass it has.

    Raises:
        RefusedError: that way was asked for and can't run, or another name came.
    """
    written, other = WAYS[name]
    requested = way_asked_for(name, requested)
    if reason is None and requested is None:
        reason = written_by_itself(platform)
    chosen = choose_named(name, backend, requested, {written: reason, other: None})
    if name == "train_pass":
        why = ", as asked for" if requested is not None else "" if reason is None else f" ({written} {reason})"
        _say_once(f"{backend} on {platform} runs the {chosen} training pass{why}")
    return chosen == written


@cache
def _say_once(message: str) -> None:
    logger.info("%s", message)


def _preferred(reasons: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    """(name, reason) of those that come before the first one that runs."""
    return tuple((name, reason or "") for name, reason in takewhile(lambda item: item[1] is not None, reasons.items()))


def resolve(op: Op, backend: BackendName, target: Target, requested: str | None = None) -> Callable[..., Any]:
    """`select`, loaded: the callable to use."""
    return select(op, backend, target, requested).implementation.load()


def all_ops() -> tuple[Op, ...]:
    """Every op of the project, for `jaxsloth info` and for tests that walk them all."""
    found: list[Op] = []
    for folder in OP_FOLDERS:
        found.extend(import_module(f"jaxsloth.kernels.{folder}.contract").OPS)
    return tuple(found)


# Choices that a backend makes beside its ops, under the same setting: how training steps and decoding are put together.
WHOLE_PASSES = (*WAYS, "layer_loop")


def check_requested(requested: Mapping[str, str | None]) -> None:
    """Refuses a request for an op that there is none of.

    Raises:
        RefusedError: it names the op, and those that there are.
    """
    known = [op.name for op in all_ops()] + list(WHOLE_PASSES)
    for name in requested:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise RefusedError(f"implementations asks for the op {name!r}, which does not exist; {hint}")


OP_FOLDERS = (
    "nf4",
    "lora_matmul",
    "rms_norm",
    "layer_norm",
    "rope",
    "gated_activation",
    "attention",
    "linear_cross_entropy",
    "dropout",
    "lora_dropout",
    "embedding_noise",
    "adamw_8bit",
    "fp8",
    "gumbel",
)
