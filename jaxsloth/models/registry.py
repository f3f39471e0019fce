"""Which families there are, and which one a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsloth.foreign import validated
from jaxsloth.models import llama
from jaxsloth.models.config import ConfigError, NamedFields
from jaxsloth.models.spec import ModelSpec

# family -> the module that knows it. A family stands here when both backends run it and tests against transformers say so.
_FAMILIES = {"llama": llama}
_NAMES = {"llama": "Llama 2, 3, 3.1, 3.2; SmolLM, SmolLM2"}


def families() -> dict[str, str]:
    """Every supported family and the models that it covers."""
    return dict(_NAMES)


def spec_from_config(config: Mapping[str, Any], where: str | Path = "config.json") -> ModelSpec:
    """The spec of a checkpoint's Hugging Face config (a dict, as in config.json).

    Args:
        where: the file that it is from, for errors.

    Raises:
        ConfigError: the architecture is not supported (the message lists those that are), or a field is wrong.
    """
    fields = validated(NamedFields, config, where, ConfigError)
    named = tuple(fields.architectures or ())
    for family, module in _FAMILIES.items():
        if any(name in module.ARCHITECTURES for name in named) or (not named and fields.model_type == family):
            return module.spec_from_config(config, where)
    supported = [name for module in _FAMILIES.values() for name in module.ARCHITECTURES]
    got = ", ".join(named) or fields.model_type or "a config with neither architectures nor model_type"
    raise ConfigError(f"{where}: unsupported architecture: {got}; supported: {', '.join(supported)}")
