"""Adapters in and out, whatever their format: PEFT folders and GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxsloth.convert.checkpoint import resolve_path
from jaxsloth.convert.gguf_adapter import gguf_adapter, is_gguf_adapter
from jaxsloth.convert.peft_adapter import base_model_of, find_adapter, fitted_adapter, merging_adapter
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.spec import ModelSpec

Values = dict[str, np.ndarray]


def base_of_adapter(source: str, base: str | None) -> str:
    """The base to read an adapter with: the one that is given, else what a PEFT folder names.

    Raises:
        CheckpointError: source is no adapter, or names no base.
    """
    path = resolve_path(source)
    if is_gguf_adapter(path):
        if base is None:
            raise CheckpointError(f"{path} says nothing of its base; give the base's checkpoint too (--base)")
        return base
    folder = find_adapter(source)
    if folder is None:
        raise CheckpointError(f"{source} is no adapter: neither a PEFT folder nor a GGUF file of a LoRA adapter")
    return base if base is not None else base_model_of(folder)


def read_fitted(source: str | Path, spec: ModelSpec) -> tuple[ModelSpec, Values]:
    """An adapter of any format on a model: (its spec with the adapters, their values), as `fitted_adapter` says.

    Raises:
        CheckpointError: it can't be read, or is not one of this model.
    """
    path = resolve_path(str(source))
    return gguf_adapter(path, spec) if is_gguf_adapter(path) else fitted_adapter(path, spec)


def read_merging(source: Path, spec: ModelSpec) -> tuple[ModelSpec, Values]:
    """`read_fitted` of an adapter that is merged, DoRA's too, as `merging_adapter` says."""
    path = resolve_path(str(source))
    return gguf_adapter(path, spec) if is_gguf_adapter(path) else merging_adapter(path, spec)
