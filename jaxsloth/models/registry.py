"""Which families there are, and which one a checkpoint belongs to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsloth.foreign import validated
from jaxsloth.models.config import ConfigError, NamedFields
from jaxsloth.models.gemma import gemma, gemma2, gemma3
from jaxsloth.models.llama import llama
from jaxsloth.models.mistral import mistral
from jaxsloth.models.phi3 import phi3
from jaxsloth.models.qwen import qwen2, qwen3
from jaxsloth.models.smollm3 import smollm3
from jaxsloth.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """architecture: Hugging Face's class; spec_of: (config, where it is from) -> spec; covers: models that it has."""

    architecture: str
    spec_of: Callable[[Mapping[str, Any], str | Path], ModelSpec]
    covers: str


# model_type -> family. One stands here when both backends run it and tests against transformers say so.
_FAMILIES = {
    "llama": Family("LlamaForCausalLM", llama, "Llama 2, 3, 3.1, 3.2; SmolLM, SmolLM2"),
    "qwen2": Family("Qwen2ForCausalLM", qwen2, "Qwen 2, 2.5"),
    "qwen3": Family("Qwen3ForCausalLM", qwen3, "Qwen 3 (dense)"),
    "mistral": Family("MistralForCausalLM", mistral, "Mistral 7B, Nemo, Small"),
    "gemma": Family("GemmaForCausalLM", gemma, "Gemma"),
    "gemma2": Family("Gemma2ForCausalLM", gemma2, "Gemma 2"),
    "gemma3_text": Family("Gemma3ForCausalLM", gemma3, "Gemma 3 (text: 270M, 1B)"),
    "phi3": Family("Phi3ForCausalLM", phi3, "Phi-3, 3.5 (mini, medium), Phi-4"),
    "smollm3": Family("SmolLM3ForCausalLM", smollm3, "SmolLM3"),
}


def families() -> dict[str, str]:
    """Every supported family and the models that it covers."""
    return {name: family.covers for name, family in _FAMILIES.items()}


def architectures() -> dict[str, str]:
    """Every supported family and Hugging Face's class of it."""
    return {name: family.architecture for name, family in _FAMILIES.items()}


def spec_from_config(config: Mapping[str, Any], where: str | Path = "config.json") -> ModelSpec:
    """The spec of a checkpoint's Hugging Face config (a dict, as in config.json).

    Args:
        where: the file that it is from, for errors.

    Raises:
        ConfigError: the architecture is not supported (the message lists those that are and the nearest), or a field is wrong.
    """
    fields = validated(NamedFields, config, where, ConfigError)
    named = tuple(fields.architectures or ())
    for model_type, family in _FAMILIES.items():
        if family.architecture in named or (not named and fields.model_type == model_type):
            return family.spec_of(config, where)
    supported = [family.architecture for family in _FAMILIES.values()]
    got = ", ".join(named) or fields.model_type or "a config with neither architectures nor model_type"
    nearest = difflib.get_close_matches(got, supported, n=1)
    hint = f" (the nearest is {nearest[0]})" if nearest else ""
    raise ConfigError(f"{where}: unsupported architecture: {got}; supported: {', '.join(supported)}{hint}")
