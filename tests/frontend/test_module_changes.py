"""What scripts put into or around a module model's layers, and would have no effect, is refused by name."""

from __future__ import annotations

import copy
from functools import cache
from types import MethodType
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from jaxsloth.frontend.module.peft_adoption import PeftFeatureError
from tests.support.modules import BACKENDS, adapted, batch, our_base

both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def bases():
    return cache(lambda backend: our_base(backend, num_hidden_layers=2))


def q_proj(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].self_attn.q_proj


def doubled(module: Any, inputs: Any, output: Any) -> Any:
    return 2 * output


def swap(layers: Any) -> None:
    layers[0], layers[1] = layers[1], layers[0]


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Halving(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


def put(module: Any, index: int, other: nn.Module) -> None:
    module[index] = other


def layers(model: Any) -> Any:
    return model.base_model.model.model.layers


CHANGES: dict[str, tuple[Any, str]] = {
    "hook on a base layer": (
        lambda model: q_proj(model).base_layer.register_forward_hook(doubled),
        r"model.layers.0.self_attn.q_proj has a hook \(doubled\)",
    ),
    "pre-hook on a base layer": (
        lambda model: q_proj(model).base_layer.register_forward_pre_hook(lambda module, inputs: None),
        "model.layers.0.self_attn.q_proj has a hook",
    ),
    "hook on a LoRA layer": (
        lambda model: q_proj(model, 1).register_forward_hook(doubled),
        r"model.layers.1.self_attn.q_proj has a hook \(doubled\)",
    ),
    "hook on lora_B": (
        lambda model: q_proj(model).lora_B["default"].register_forward_hook(doubled),
        r"q_proj.lora_B.default has a hook \(doubled\)",
    ),
    "backward hook on lora_A": (
        lambda model: q_proj(model).lora_A["default"].register_full_backward_hook(lambda *arguments: None),
        "q_proj.lora_A.default has a hook",
    ),
    "hook on a block": (
        lambda model: layers(model)[1].register_forward_hook(doubled),
        r"model.layers.1 has a hook \(doubled\)",
    ),
    "hook on the backbone": (
        lambda model: model.base_model.model.model.register_forward_hook(doubled),
        r"model has a hook \(doubled\)",
    ),
    "forward of a block": (
        lambda model: setattr(layers(model)[0], "forward", MethodType(doubled, layers(model)[0])),
        "model.layers.0.forward was replaced",
    ),
    "forward of a LoRA layer": (
        lambda model: setattr(q_proj(model), "forward", lambda x: x),
        "model.layers.0.self_attn.q_proj.forward was replaced",
    ),
    "a block replaced": (
        lambda model: put(layers(model), 0, nn.Identity()),
        "model.layers.0 was replaced by a Identity",
    ),
    "a block wrapped": (
        lambda model: put(layers(model), 0, Wrapped(layers(model)[0])),
        "model.layers.0 was replaced by a Wrapped",
    ),
    "blocks swapped": (lambda model: swap(layers(model)), "model.layers.0.input_layernorm is model.layers.1.input_layernorm"),
    "blocks left out": (
        lambda model: layers(model).__delitem__(1),
        "must have the 2 layers that the backend computes, and it has 1|model.layers.1.* is not in the model any more",
    ),
    "blocks added": (
        lambda model: layers(model).append(layers(model)[0]),
        "must have the 2 layers that the backend computes, and it has 3",
    ),
    "parametrized lora_B": (
        lambda model: parametrize.register_parametrization(q_proj(model).lora_B["default"], "weight", Halving()),
        "q_proj.lora_B.default was replaced by a ParametrizedLinear",
    ),
}


@both
@pytest.mark.parametrize("name", CHANGES)
def test_what_would_have_no_effect_is_refused_by_name(name, backend, bases):
    change, message = CHANGES[name]
    model = adapted(copy.deepcopy(bases(backend)))
    ids = batch((9,))["input_ids"]
    change(model)
    with pytest.raises(PeftFeatureError, match=message):
        model(ids)


@both
def test_an_adapter_for_every_row_is_refused(backend, bases):
    model = adapted(copy.deepcopy(bases(backend))).eval()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = batch((9, 9))["input_ids"]
    with pytest.raises(PeftFeatureError, match=r"adapter_names \(an adapter for every row\)"):
        model(input_ids=ids, adapter_names=["default", "second"])
    assert torch.isfinite(model(ids).logits).all()  # PEFT has taken its hooks away again
