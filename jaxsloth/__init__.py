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
    from jaxsloth.frontend.fast_model import FastLanguageModel, FastModel, is_bfloat16_supported
    from jaxsloth.frontend.trainer import SFTConfig, SFTTrainer
    from jaxsloth.frontend.unsloth_names import (
        FastTextModel,
        PatchDPOTrainer,
        PatchFastRL,
        PatchKTOTrainer,
        UnslothTrainer,
        UnslothTrainingArguments,
        is_bf16_supported,
        unsloth_train,
    )
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
    "jaxsloth.frontend.fast_model": ("FastLanguageModel", "FastModel", "is_bfloat16_supported"),
    "jaxsloth.frontend.trainer": ("SFTConfig", "SFTTrainer"),
    "jaxsloth.frontend.unsloth_names": (
        *("FastTextModel", "PatchDPOTrainer", "PatchFastRL", "PatchKTOTrainer", "UnslothTrainer"),
        *("UnslothTrainingArguments", "is_bf16_supported", "unsloth_train"),
    ),
    "jaxsloth.recipe": ("Recipe",),
}
_NEED_FRONTEND = (
    "jaxsloth.frontend.dpo_trainer",
    "jaxsloth.frontend.fast_model",
    "jaxsloth.frontend.trainer",
    "jaxsloth.frontend.unsloth_names",
)
# What scripts import and is not here yet -> what to do.
_TRL_TRAINS = "TRL's own trainer drives these models as it is"
_NOT_YET = {
    **dict.fromkeys(("FastVisionModel", "UnslothVisionDataCollator"), "vision models are not supported; use FastLanguageModel"),
    **dict.fromkeys(("GRPOTrainer", "GRPOConfig", "vLLMSamplingParams"), f"there is no GRPO trainer; {_TRL_TRAINS}"),
    **{f"{name}{part}": _TRL_TRAINS for name in ("KTO", "ORPO", "Reward", "RLOO") for part in ("Trainer", "Config")},
    **dict.fromkeys(("FastSentenceTransformer", "FastDiffusionModel"), "only language models are; use FastLanguageModel"),
    "add_new_tokens": "a model's vocabulary can't grow; choose tokens that it has",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "FastLanguageModel",
    "FastModel",
    "FastTextModel",
    "PatchDPOTrainer",
    "PatchFastRL",
    "PatchKTOTrainer",
    "Recipe",
    "SFTConfig",
    "SFTTrainer",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "__version__",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "load_backend",
    "memory_stats",
    "set_backend",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
]


def __getattr__(name: str) -> Any:
    if name in _NOT_YET:  # no AttributeError: `from jaxsloth import …` would leave its words out
        raise ImportError(f"jaxsloth.{name} is not here yet: {_NOT_YET[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'jaxsloth' has no attribute {name!r}; it has: {', '.join(sorted(_HOME))}")
    if _HOME[name] in _NEED_FRONTEND:
        require("frontend", f"jaxsloth.{name}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
