"""Who takes part: each contender's name, its builder, and what must be installed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.work import Runner, Work


@dataclass(frozen=True)
class Contender:
    """`path` is ``module:function``, a ``build(folder, work) -> Runner``; importing the module imports its framework."""

    name: str
    path: str
    needs: tuple[str, ...]
    checkpointing: tuple[str, str]  # its own words for keeping everything, and for its lowest memory

    def missing(self) -> list[str]:
        return [package for package in self.needs if find_spec(package) is None]

    def load(self) -> Callable[[Path, Work], Runner]:
        """The builder, everything that it needs imported."""
        for package in self.needs:
            import_module(package)
        module, _, function = self.path.partition(":")
        return getattr(import_module(module), function)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("jaxsloth-torch", "benchmarks.peers.own:build_torch", ("torch",), ("none", "offload")),
        Contender("jaxsloth-jax", "benchmarks.peers.own:build_jax", ("jax", "flax", "optax"), ("none", "full")),
        Contender(
            "hf",
            "benchmarks.peers.hf:build",
            ("torch", "transformers", "peft", "bitsandbytes", "accelerate"),
            ("false", "true"),
        ),
        Contender("unsloth", "benchmarks.peers.unsloth:build", ("unsloth",), ("false", "unsloth")),
        Contender(
            "module-torch", "benchmarks.peers.module:build_torch", ("torch", "transformers", "peft"), ("none", "offload")
        ),
        Contender(
            "module-jax",
            "benchmarks.peers.module:build_jax",
            ("jax", "flax", "optax", "torch", "transformers", "peft"),
            ("none", "full"),
        ),
        # Not a trainer: the step's bare products, the floor that this device really has.
        Contender("floor", "benchmarks.peers.floor:build", ("torch",), ("none", "offload")),
    )
}
DEFAULT = "jaxsloth-torch,jaxsloth-jax,unsloth,hf"


@dataclass(frozen=True)
class Entry:
    """One line of a table: a contender with its settings, as asked for by ``name[:checkpointing][:field=value…]``."""

    label: str
    contender: Contender
    checkpointing: str | None
    options: dict[str, str]


def parse_entries(text: str) -> list[Entry]:
    """The entries of a comma-separated list such as ``jaxsloth-torch:full,jaxsloth-jax:none:compute=fp8,hf``.

    Raises:
        ValueError: a name that is no contender's, or a setting given twice.
    """
    entries = []
    for label in text.split(","):
        name, *settings = label.strip().split(":")
        if name not in CONTENDERS:
            raise ValueError(f"contender must be one of {list(CONTENDERS)}, got {name!r}")
        words = [setting for setting in settings if "=" not in setting]
        if len(words) > 1:
            raise ValueError(f"{label}: at most one word may say how to checkpoint, got {words}")
        options = dict(setting.split("=", 1) for setting in settings if "=" in setting)
        entries.append(Entry(label.strip(), CONTENDERS[name], words[0] if words else None, options))
    return entries
