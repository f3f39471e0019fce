"""Where trained weights start: from the recipe's seed alone, the same on every backend and for any order of building."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from jaxsloth.convert.adapters import read_fitted
from jaxsloth.models.names import lora_names, own_name, trainable_shapes
from jaxsloth.models.spec import ModelSpec
from jaxsloth.recipe import Recipe


def with_adapters(recipe: Recipe, spec: ModelSpec) -> tuple[ModelSpec, dict[str, np.ndarray] | None]:
    """(the spec of the model that a recipe trains, the values of its lora.adapter; None where they begin from the seed).

    Raises:
        CheckpointError: the adapter can't be read, or is not one of this model.
    """
    if recipe.lora.adapter is None:
        return recipe.apply(spec), None
    adapted, values = read_fitted(recipe.lora.adapter, recipe.quantized(spec))
    assert adapted.lora is not None
    return replace(adapted, lora=replace(adapted.lora, dropout=recipe.lora.dropout)), values


def initial_adapters(
    spec: ModelSpec, init: Literal["kaiming", "gaussian"], seed: int, base: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """The start of everything that `spec` trains, by PEFT name, float32.

    A is U(-1/√in, 1/√in) ("kaiming": kaiming_uniform with a = √5, as PEFT does by default) or N(0, 1/r²) ("gaussian", as PEFT
    does); B is zero; biases and modules trained whole start as copies of the base.

    Args:
        base: a base tensor by Hugging Face name, asked only for what is copied.
    """
    if spec.lora is None:
        raise ValueError("the model has no adapters to initialize")
    values: dict[str, np.ndarray] = {}
    shapes = trainable_shapes(spec)
    for module in spec.lora.modules:
        a, b = lora_names(module)
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(module.encode())]))
        if init == "kaiming":
            bound = 1.0 / math.sqrt(shapes[a][1])
            values[a] = generator.uniform(-bound, bound, shapes[a]).astype(np.float32)
        else:
            values[a] = generator.normal(0.0, 1.0 / spec.lora.r, shapes[a]).astype(np.float32)
        values[b] = np.zeros(shapes[b], np.float32)
    for name in shapes:
        if name not in values:
            values[name] = np.array(base(own_name(name)), np.float32)
    return {name: values[name] for name in shapes}
