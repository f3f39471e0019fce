"""Merging an adapter into its base, a tensor at a time; `run.convert` walks the tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxsloth.models.names import linears, lora_names, own_name, saved_name
from jaxsloth.models.spec import ModelSpec

MAGNITUDE = ".lora_magnitude_vector"  # DoRA's, [out], as PEFT stores it


def is_trained(name: str, values: Mapping[str, np.ndarray]) -> bool:
    """Whether an adapter's values change the base tensor of that name."""
    return lora_names(name.removesuffix(".weight"))[0] in values or any(own_name(trained) == name for trained in values)


def merged(name: str, tensor: np.ndarray, spec: ModelSpec, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A base tensor with its adapter added, ``W + scale · B·A`` in float32, or what was trained in its place; others come back
    as they are. Where the adapter has magnitudes (DoRA), each row is brought to its magnitude."""
    for trained, value in values.items():
        if own_name(trained) == name:
            return value
    a, b = lora_names(name.removesuffix(".weight"))
    if spec.lora is None or a not in values:
        return tensor
    found = tensor.astype(np.float32) + np.float32(spec.lora.scale) * (values[b] @ values[a])
    magnitude = values.get(saved_name(name.removesuffix(".weight") + MAGNITUDE))
    return found if magnitude is None else found * (magnitude / np.linalg.norm(found, axis=1))[:, None]


def magnitude_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """DoRA's magnitudes of a spec's adapters by PEFT's names."""
    modules = spec.lora.modules if spec.lora is not None else ()
    return {saved_name(linear.name + MAGNITUDE): (linear.out_features,) for linear in linears(spec) if linear.name in modules}
