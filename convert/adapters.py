"""Adapters in and out, whatever their format: PEFT folders and GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxsloth.convert.checkpoint import resolve_path
from jaxsloth.convert.gguf_adapter import gguf_adapter, is_gguf_adapter
from jaxsloth.convert.peft_adapter import base_model_of, find_adapter, fitted_adapter, merging_adapter, read_config
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


def note_on_base(adapter: Path, base: str) -> str | None:
    """What a user should know where a PEFT adapter that fits a model says that it belongs to another."""
    folder = find_adapter(adapter)
    stated = None if folder is None else read_config(folder, dora=True).base_model
    if not stated or Path(stated).name == Path(base).name:
        return None
    return f"the adapter names {stated} as its base, and is merged into {base}: right where both are the same weights"


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
