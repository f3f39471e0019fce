"""What `jaxsloth info --families` tells, by transformers' default config of each family."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from jaxsloth.backend import BACKENDS
from jaxsloth.extras import missing_packages
from jaxsloth.info import features, passes_of
from jaxsloth.models.buildable import decode_refusal
from jaxsloth.models.registry import architectures, families, spec_from_config
from jaxsloth.transforms import add_lora


def family_passes() -> dict[str, Any]:
    """Every family: its architecture, the models that it covers, what its blocks have, and how they train with LoRA on every
    linear layer, as plain data. The last two are of transformers' default config."""
    found = {}
    for name, models in families().items():
        spec = spec_from_config(AutoConfig.for_model(name).to_dict() | {"architectures": [architectures()[name]]}, name)
        adapted = add_lora(spec, r=16, alpha=16)
        trains = {backend: passes_of(backend, adapted, None) for backend in BACKENDS if not missing_packages(backend)}
        found[name] = {
            "architecture": architectures()[name],
            "covers": models,
            "has": features(spec),
            "decoding": decode_refusal(spec),
            "trains": {backend: choice.get("blocks", choice.get("error")) for backend, choice in trains.items()},
        }
    return found
