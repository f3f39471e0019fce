"""jaxsloth: LoRA and QLoRA fine-tuning on PyTorch and on JAX, with the same numbers.

Importing this package imports neither torch, jax nor transformers; each public name is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxsloth.extras import require

if TYPE_CHECKING:
    from jaxsloth.backend import load_backend
    from jaxsloth.chat_templates import (
        get_chat_template,
        standardize_data_formats,
        standardize_sharegpt,
        to_sharegpt,
        train_on_responses_only,
    )
    from jaxsloth.frontend.backends import memory_stats, set_backend
    from jaxsloth.frontend.dpo_trainer import DPOConfig, DPOTrainer
    from jaxsloth.frontend.fast_model import FastLanguageModel, FastModel, PatchDPOTrainer, is_bfloat16_supported
    from jaxsloth.frontend.trainer import SFTConfig, SFTTrainer
    from jaxsloth.recipe import Recipe

__version__ = "0.1.0"

_HOMES = {
    "jaxsloth.backend": ("load_backend",),
    "jaxsloth.chat_templates": (
        "get_chat_template",
        "standardize_data_formats",
        "standardize_sharegpt",
        "to_sharegpt",
        "train_on_responses_only",
    ),
    "jaxsloth.frontend.backends": ("memory_stats", "set_backend"),
    "jaxsloth.frontend.dpo_trainer": ("DPOConfig", "DPOTrainer"),
    "jaxsloth.frontend.fast_model": ("FastLanguageModel", "FastModel", "PatchDPOTrainer", "is_bfloat16_supported"),
    "jaxsloth.frontend.trainer": ("SFTConfig", "SFTTrainer"),
    "jaxsloth.recipe": ("Recipe",),
}
_NEED_FRONTEND = ("jaxsloth.frontend.dpo_trainer", "jaxsloth.frontend.fast_model", "jaxsloth.frontend.trainer")
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "FastLanguageModel",
    "FastModel",
    "PatchDPOTrainer",
    "Recipe",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "get_chat_template",
    "is_bfloat16_supported",
    "load_backend",
    "memory_stats",
    "set_backend",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxsloth' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")
    if _HOME[name] in _NEED_FRONTEND:
        require("frontend", f"jaxsloth.{name}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
