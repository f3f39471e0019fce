"""PEFT's adapters of a module model in its backend, and back: native training and cached decoding run on the backend's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from jaxsloth.backend import Model
from jaxsloth.convert.adapter_rules import at_rank
from jaxsloth.frontend.module.peft_adoption import Active, active_parts
from jaxsloth.models.names import linears, lora_names, own_name, trainable_shapes
from jaxsloth.models.spec import Lora, ModelSpec

Values = dict[str, np.ndarray]


def base_of(model: Any) -> Any:
    """The model under PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def push_for_inference(base: Any) -> None:
    """Gives the backend what is active in `base` now, for decoding. Disabled adapters are zeros there, and biases that nobody
    trained the base's. While a native trainer runs it gets back what it trains before it goes on."""
    if base.shared is not None and base.shared.show():
        return
    model: Model = base.engine.model
    active = active_parts(base, model.spec)
    adapters = active.adapters
    if not active and model.spec.lora is None:
        return
    shapes = {(adapter.a.shape[0], adapter.scaling) for adapter in adapters.values()}
    held = model.spec.lora
    fits = held is not None and set(adapters) <= set(held.modules) and shapes <= {(held.r, held.scale)}
    if held is not None and fits and set(active.full_weights) <= {own_name(name) for name in trainable_shapes(model.spec)}:
        if base.shared is not None:
            base.shared.lend(rebuilds=False)
        model.load_trainable(_values(base, model.spec, active))
        return
    spec, values = _folded(base, active, held.modules if held is not None else ())
    if base.shared is not None:
        base.shared.lend(rebuilds=True)
    model.add_adapters(spec, values)


def native_adapter(base: Any) -> tuple[ModelSpec, Values]:
    """What is active in `base` as a spec (`native_spec`) and float32 values by PEFT name."""
    active = active_parts(base, base.engine.model.spec)
    spec = native_spec(base, active)
    return spec, _values(base, spec, active)


def native_spec(base: Any, active: Active) -> ModelSpec:
    """How the backend trains what is active in `base`.

    Raises:
        ValueError: nothing is, or ranks, scalings or dropout rates differ, or biases are trained that are neither all nor those
            of the adapted layers.
    """
    model: Model = base.engine.model
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
    bias = _bias(model.spec, active)
    lora = Lora(rank, alpha, scale, dropout, modules, modules_to_save=_saved(active), bias=bias, rslora=rslora)
    return replace(model.spec, lora=lora)


def folded_adapter(base: Any) -> tuple[ModelSpec, Values]:
    """What is active in `base`, as what answers and what is merged: of one rank and scaling whatever they are by layer, nothing
    dropped; the base alone where nothing is active."""
    spec: ModelSpec = base.engine.model.spec
    active = active_parts(base, spec)
    return _folded(base, active, ()) if active else (replace(spec, lora=None), {})


def _folded(base: Any, active: Active, more: Sequence[str]) -> tuple[ModelSpec, Values]:
    """The largest rank, with every scaling folded into its B; zeros in the modules of `more` that have no active adapter."""
    adapters, model = active.adapters, base.engine.model
    rank = max((adapter.a.shape[0] for adapter in adapters.values()), default=1)
    scale = next((adapter.scaling for adapter in adapters.values() if adapter.scaling), 1.0)
    bias = "all" if _biased(active) else "none"
    modules = _ordered(model.spec, {*adapters, *more})
    lora = Lora(rank, scale * rank, scale, 0.0, modules, modules_to_save=_saved(active), bias=bias)
    spec = replace(model.spec, lora=lora)
    return spec, _values(base, spec, active)


def scaled(values: Mapping[str, np.ndarray], factor: float) -> Values:
    """The same adapters for a backend whose scaling is so many times smaller."""
    return {name: own * np.float32(factor) if ".lora_B." in name else own for name, own in values.items()}


def pull(base: Any, values: Mapping[str, np.ndarray]) -> None:
    """Writes values into PEFT's parameters."""
    with torch.no_grad():
        for name, parameter in parts_by_name(active_parts(base, base.engine.model.spec), values).items():
            parameter.copy_(torch.from_numpy(np.array(values[name])))


def parts_by_name(active: Active, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """PEFT's parameters of what is active by their names among `names`; what `names` lacks comes under a name that is not
    PEFT's."""
    peft_names = {own_name(name): name for name in names}
    found: dict[str, nn.Parameter] = {}
    for module, adapter in active.adapters.items():
        found |= dict(zip(lora_names(module), (adapter.a, adapter.b), strict=True))
    return found | {peft_names.get(tensor, tensor): parameter for tensor, parameter in active.full_weights.items()}


def _ordered(spec: ModelSpec, modules: set[str]) -> tuple[str, ...]:
    return tuple(linear.name for linear in linears(spec) if linear.name in modules)


def _saved(active: Active) -> tuple[str, ...]:
    return tuple(tensor.removesuffix(".weight") for tensor in active.full_weights if tensor.endswith(".weight"))


def _biased(active: Active) -> set[str]:
    """The layers whose biases are no longer the base's."""
    return {tensor.removesuffix(".bias") for tensor in active.full_weights if tensor.endswith(".bias")}


def _bias(spec: ModelSpec, active: Active) -> Literal["none", "all", "lora_only"]:
    own, every = _biased(active), {linear.name for linear in linears(spec) if linear.bias}
    if not own:
        return "none"
    if own == every:
        return "all"
    if own == every & set(active.adapters):
        return "lora_only"
    raise ValueError(
        f"the trained biases must be all of the model's or those of the layers with adapters, and those of {len(own)} of "
        f"{len(every)} layers are ({min(own)}, …); train with TRL's trainer and save with PEFT"
    )


def _values(base: Any, spec: ModelSpec, active: Active) -> Values:
    """All that `spec` trains by PEFT name, float32: adapters padded to its rank, scaled to its scale, zero where none is
    active; modules trained whole and biases, the base's own where none is."""
    assert spec.lora is not None
    adapters, model = active.adapters, base.engine.model
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
        # Copies: the backend may keep what it gets, and an optimizer writes PEFT's parameters in place.
        a, b = (np.array(part.detach().float().cpu().numpy()) for part in (adapter.a, adapter.b))
        same = adapter.scaling == spec.lora.scale  # both may be zero
        found[a_name], found[b_name] = at_rank(a, b, spec.lora.r, 1.0 if same else adapter.scaling / spec.lora.scale)
    for name in trainable_shapes(spec):
        tensor = own_name(name)
        if tensor in active.full_weights:
            found[name] = np.array(active.full_weights[tensor].detach().float().cpu().numpy())
        elif name not in found:
            found[name] = np.array(model.base_tensor(tensor), np.float32)
    return found
