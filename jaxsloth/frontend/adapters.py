"""PEFT's adapters of a module model in its backend, and back: native training and cached decoding run on the backend's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from jaxsloth.backend import Model
from jaxsloth.frontend.module.passes import to_torch
from jaxsloth.frontend.module.peft_adoption import Active, active_parts
from jaxsloth.models.names import linears, lora_names, saved_name
from jaxsloth.models.spec import Lora, ModelSpec

Values = dict[str, np.ndarray]


def base_of(model: Any) -> Any:
    """The model under PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def show_backend(base: Any) -> None:
    """Gives the backend what is active in `base` now, for decoding. Disabled adapters are zeros there."""
    if base.behind is not None:
        base.behind()
    model: Model = base.engine.model
    active = active_parts(base, model.spec)
    adapters, saved = active.adapters, _saved(active)
    if not active and model.spec.lora is None:
        return
    shapes = {(adapter.a.shape[0], adapter.scaling) for adapter in adapters.values()}
    held = model.spec.lora
    fits = held is not None and set(adapters) <= set(held.modules) and shapes <= {(held.r, held.scale)}
    if held is not None and fits and set(saved) <= set(held.modules_to_save):
        model.load_trainable(_values(base, model.spec, active))
        return
    # Ranks and scalings may differ by layer: the largest rank, with every scaling folded into its B.
    rank = max(adapter.a.shape[0] for adapter in adapters.values())
    scale = adapters[next(iter(adapters))].scaling
    modules = _ordered(model.spec, {*adapters, *(held.modules if held is not None else ())})
    spec = replace(model.spec, lora=Lora(rank, scale * rank, scale, 0.0, modules, modules_to_save=saved))
    model.add_adapters(spec, _values(base, spec, active))


def give_backend(base: Any) -> ModelSpec:
    """Gives the backend exactly what is active in `base`, to be trained; the spec that it has then.

    Raises:
        ValueError: as `native_adapter`.
    """
    model: Model = base.engine.model
    spec, values = native_adapter(base)
    if spec == model.spec:
        model.load_trainable(values)
    else:
        model.add_adapters(spec, values)
    return spec


def native_adapter(base: Any) -> tuple[ModelSpec, Values]:
    """What is active in `base` as a spec and float32 values by PEFT name.

    Raises:
        ValueError: there is none, or ranks, scalings or dropout rates differ among them.
    """
    model: Model = base.engine.model
    active = active_parts(base, model.spec)
    adapters = active.adapters
    if not adapters:
        raise ValueError("the model has no active adapter; call FastLanguageModel.get_peft_model first")
    kinds = {(adapter.a.shape[0], adapter.scaling, adapter.dropout) for adapter in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(
            "the adapters must have one rank, alpha and dropout here, and these (rank, scaling, dropout) came: "
            f"{sorted(kinds)}; with rank_pattern or alpha_pattern, train with TRL's trainer and save with PEFT"
        )
    rank, scale, dropout = kinds.pop()
    rslora = any(config.use_rslora for config in (getattr(base, "peft_config", None) or {}).values())
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    modules = _ordered(model.spec, set(adapters))
    lora = Lora(rank, alpha, scale, dropout, modules, modules_to_save=_saved(active), rslora=rslora)
    spec = replace(model.spec, lora=lora)
    return spec, _values(base, spec, active)


def take_back(base: Any, values: Mapping[str, np.ndarray]) -> None:
    """Writes trained values into PEFT's parameters."""
    active = active_parts(base, base.engine.model.spec)
    with torch.no_grad():
        for module, adapter in active.adapters.items():
            for name, parameter in zip(lora_names(module), (adapter.a, adapter.b), strict=True):
                parameter.copy_(torch.from_numpy(np.array(values[name])))
        for tensor, parameter in active.whole.items():
            parameter.copy_(torch.from_numpy(np.array(values[saved_name(tensor)])))


def _ordered(spec: ModelSpec, modules: set[str]) -> tuple[str, ...]:
    return tuple(linear.name for linear in linears(spec) if linear.name in modules)


def _saved(active: Active) -> tuple[str, ...]:
    return tuple(tensor.removesuffix(".weight") for tensor in active.whole)


def _values(base: Any, spec: ModelSpec, active: Active) -> Values:
    """All that `spec` trains by PEFT name, float32: adapters padded to its rank, scaled to its scale, zero where none is
    active; modules trained whole, the base's own where none is."""
    assert spec.lora is not None
    adapters = active.adapters
    shapes = {linear.name: (linear.in_features, linear.out_features) for linear in linears(spec)}
    found: Values = {}
    for module in spec.lora.modules:
        a_name, b_name = lora_names(module)
        if module not in adapters:
            width, out = shapes[module]
            found[a_name] = np.zeros((spec.lora.r, width), np.float32)
            found[b_name] = np.zeros((out, spec.lora.r), np.float32)
            continue
        adapter = adapters[module]
        missing = spec.lora.r - adapter.a.shape[0]
        a = functional.pad(adapter.a.detach().float(), (0, 0, 0, missing))
        b = functional.pad(adapter.b.detach().float(), (0, missing))
        if adapter.scaling != spec.lora.scale:
            b = b * (adapter.scaling / spec.lora.scale)
        # Copies: the backend may keep what it gets, and an optimizer writes PEFT's parameters in place.
        found[a_name], found[b_name] = np.array(a.cpu().numpy()), np.array(b.cpu().numpy())
    for module in spec.lora.modules_to_save:
        tensor = f"{module}.weight"
        weight = active.whole[tensor] if tensor in active.whole else to_torch(base.engine.bridge.base_weight(module))
        found[saved_name(tensor)] = np.array(weight.detach().float().cpu().numpy())
    return found
