"""PEFT's LoRA layers, read anew at every pass: which adapter is active, its weights, its scaling. What the backends can't do is
refused here, with the reason, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from jaxsloth.frontend.module.skeleton import HollowEmbedding, HollowLinear, HollowNorm


class PeftFeatureError(ValueError):
    """PEFT did something to the model that its backend can't compute."""


@dataclass(frozen=True)
class Adapter:
    """The active adapter of one layer: A ``[r, in]`` and B ``[out, r]``, PEFT's own parameters."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dropout: float


def active_adapters(backbone: nn.Module, modules: Iterable[str]) -> dict[str, Adapter]:
    """The adapters to run with, by the layer's name below `backbone`. A disabled adapter is left out.

    Raises:
        PeftFeatureError: a layer was wrapped by something else than plain LoRA, or something of the base is to be trained.
    """
    found = {}
    for name in modules:
        layer = backbone.get_submodule(name)
        if isinstance(layer, HollowLinear):
            continue
        adapter = _active(name, layer)
        if adapter is not None:
            found[name] = adapter
    return found


def check_base(root: nn.Module) -> None:
    """That nothing of the base is to be trained or was replaced.

    Raises:
        PeftFeatureError: names the module.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in root.named_modules():
        if isinstance(module, HollowLinear | HollowEmbedding | HollowNorm):
            trained = [part for part, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
            if trained:
                raise PeftFeatureError(
                    f"{name}.{trained[0]} requires a gradient, and only LoRA weights are trained through this model; leave "
                    "bias at 'none' and modules_to_save empty, or train with jaxsloth's own trainers"
                )
        elif hasattr(module, "modules_to_save") and not isinstance(module, BaseTunerLayer):
            raise PeftFeatureError(
                f"{name} is wrapped in a {type(module).__name__}, and only LoRA weights are trained through this model; leave "
                "modules_to_save and trainable_token_indices empty, or train with jaxsloth's own trainers"
            )


def _active(name: str, layer: nn.Module) -> Adapter | None:
    lora = _plain_lora(name, layer)
    if lora.merged:
        raise PeftFeatureError(f"{name}: its adapter is merged, but the base weights are not in torch; call unmerge_adapter()")
    if lora.disable_adapters:
        return None
    active = [adapter for adapter in lora.active_adapters if adapter in lora.lora_A]
    if not active:
        return None
    if len(active) > 1:
        raise PeftFeatureError(f"{name}: one adapter can be active at a time, and these are: {active}; call set_adapter(one)")
    chosen = active[0]
    if chosen in lora.lora_variant:
        variant = type(lora.lora_variant[chosen]).__name__
        raise PeftFeatureError(f"{name}: the LoRA variant {variant} (use_dora and the like) is not supported; use plain LoRA")
    if lora.lora_bias.get(chosen):
        raise PeftFeatureError(f"{name}: lora_bias=True is not supported; use lora_bias=False")
    dropout = lora.lora_dropout[chosen]
    rate = dropout.p if lora.training and isinstance(dropout, nn.Dropout) else 0.0
    return Adapter(lora.lora_A[chosen].weight, lora.lora_B[chosen].weight, lora.scaling[chosen], rate)


def _plain_lora(name: str, layer: nn.Module) -> Any:
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or not isinstance(layer.base_layer, HollowLinear) or layer.fan_in_fan_out:
        raise PeftFeatureError(
            f"{name} was replaced by a {type(layer).__module__}.{type(layer).__name__}; of PEFT's methods only LoRA on linear "
            "layers is supported (peft.LoraConfig)"
        )
    return layer
