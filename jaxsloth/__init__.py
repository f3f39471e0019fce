"""jaxsloth: LoRA and QLoRA fine-tuning on PyTorch and on JAX, with the same numbers.

Importing this package imports neither torch, jax nor transformers; each public name is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsloth.backend import load_backend
    from jaxsloth.frontend.language_model import FastLanguageModel
    from jaxsloth.frontend.trainer import SFTConfig, SFTTrainer
    from jaxsloth.recipe import Recipe

__version__ = "0.1.0"

_HOME = {
    "FastLanguageModel": "jaxsloth.frontend.language_model",
    "SFTConfig": "jaxsloth.frontend.trainer",
    "SFTTrainer": "jaxsloth.frontend.trainer",
    "Recipe": "jaxsloth.recipe",
    "load_backend": "jaxsloth.backend",
}
__all__ = ["FastLanguageModel", "Recipe", "SFTConfig", "SFTTrainer", "__version__", "load_backend"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxsloth' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
