"""Names that Unsloth's scripts import, for what goes by another name here."""

from __future__ import annotations

from typing import Any

from jaxsloth.frontend.arguments import warn_once
from jaxsloth.frontend.fast_model import FastLanguageModel, is_bfloat16_supported
from jaxsloth.frontend.trainer import SFTConfig, SFTTrainer


class FastTextModel(FastLanguageModel):
    """Unsloth's name for language models among the others."""


class UnslothTrainingArguments(SFTConfig):
    """`SFTConfig`, whose embedding_learning_rate continued pretraining sets."""


class UnslothTrainer(SFTTrainer):
    """`SFTTrainer`."""


is_bf16_supported = is_bfloat16_supported


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """``trainer.train(…)``: accumulation counts tokens as it should in any case."""
    return trainer.train(*args, **kwargs)


def PatchFastRL(*args: Any, **kwargs: Any) -> None:
    """Unsloth's scripts call it before they import TRL."""
    del args, kwargs
    _nothing_to_patch("PatchFastRL")


def PatchKTOTrainer() -> None:
    """Unsloth's scripts call it before they import TRL."""
    _nothing_to_patch("PatchKTOTrainer")


def PatchDPOTrainer() -> None:
    """Unsloth's scripts call it before they import TRL."""
    _nothing_to_patch("PatchDPOTrainer")


def _nothing_to_patch(name: str) -> None:
    warn_once(
        f"{name}: nothing needs patching; TRL's trainers drive these models as they are, and jaxsloth.SFTTrainer and "
        "jaxsloth.DPOTrainer train them faster"
    )
