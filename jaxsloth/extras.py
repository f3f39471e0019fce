"""The package's extras: what each brings, and the error that names the one to install."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

_FRAMEWORKS = {"torch": ("torch",), "jax": ("jax", "flax", "optax")}
# Import names of what pyproject.toml's extras install and this package's parts import.
PACKAGES: dict[str, tuple[str, ...]] = {
    **_FRAMEWORKS,
    "orbax": ("orbax",),
    "evaluate": ("rouge_score", "sacrebleu"),
    "frontend": ("torch", "peft", "accelerate"),
    "check": ("torch", "peft", "accelerate", "bitsandbytes", "xllamacpp"),
    "demo": ("torch", "peft", "accelerate", *_FRAMEWORKS["jax"]),
    "parity": ("torch", "peft", "accelerate", *_FRAMEWORKS["jax"], "trl", "bitsandbytes"),
}


class MissingExtraError(ImportError):
    """A part was asked for whose packages are not installed."""


def missing_packages(extra: str) -> list[str]:
    """What an extra brings and is not installed; nothing is imported."""
    return [package for package in PACKAGES[extra] if find_spec(package) is None]


def require(extra: str, what: str, error: type[Exception] = MissingExtraError, *, only: Collection[str] | None = None) -> None:
    """That an extra's packages (or `only` those of them) are installed; else an error that says what needs them, and how to
    install them."""
    missing = [package for package in missing_packages(extra) if only is None or package in only]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise error(f"{what} needs {', '.join(missing)}, which {are} not installed; run: pip install 'jaxsloth[{extra}]'")
