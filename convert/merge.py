"""Merging an adapter into its base: a plain Hugging Face checkpoint, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsloth.backend import DtypeName, TensorSource
from jaxsloth.convert.files import whole_folder
from jaxsloth.convert.fitting import check_cast
from jaxsloth.convert.peft_adapter import check_values
from jaxsloth.convert.safetensors_writer import SHARD_BYTES, SafetensorsWriter
from jaxsloth.models.names import lora_names, own_name, tensor_shapes, trainable_shapes
from jaxsloth.models.spec import ModelSpec

Store = Callable[[str, np.ndarray], dict[str, np.ndarray] | None]
_DTYPES: dict[DtypeName, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def write_merged(
    folder: Path,
    source: TensorSource,
    spec: ModelSpec,
    values: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    dtype: DtypeName,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    store: Store | None = None,
) -> None:
    """Writes ``W + scale · B·A`` (formed in float32, rounded once to dtype) for adapted layers and every other tensor as it is.

    One tensor is held in memory at a time. The folder appears whole or not at all.

    Args:
        store: may say by name how a merged tensor is stored instead: as these tensors. config is then written with its
            quantization_config.

    Raises:
        ExistsError: the folder exists and overwrite is False.
        ValueError: values do not fit the spec, or the source is quantized (its rounding would be lost silently).
    """
    check_values(values, trainable_shapes(spec), "the adapter to merge")
    names = tensor_shapes(spec)
    with whole_folder(Path(folder), overwrite=overwrite) as temporary:
        with SafetensorsWriter(temporary, names, shard_bytes, 1 if store is None else 6) as writer:
            for name in names:
                tensor = source.read(name)
                if not isinstance(tensor, np.ndarray):
                    raise ValueError(f"{name} is stored as NF4; merge into the 16-bit checkpoint that it was made from")
                whole = merged(name, tensor, spec, values)
                stored = store(name, whole) if store is not None else None
                writer.add(*(stored or {name: check_cast(name, whole, _DTYPES[dtype])}).items())
        left_out = ("quantization_config",) if store is None else ()
        plain = {key: value for key, value in config.items() if key not in left_out} | {"dtype": dtype}
        (temporary / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def merged(name: str, tensor: np.ndarray, spec: ModelSpec, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A base tensor with its adapter added, in float32, or what was trained in its place; others come back as they are."""
    for trained, value in values.items():
        if own_name(trained) == name:
            return value
    a, b = lora_names(name.removesuffix(".weight"))
    if spec.lora is None or a not in values:
        return tensor
    return tensor.astype(np.float32) + np.float32(spec.lora.scale) * (values[b] @ values[a])
