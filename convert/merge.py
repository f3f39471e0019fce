"""Merging an adapter into its base: a plain Hugging Face checkpoint, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxsloth.backend import DtypeName, TensorSource
from jaxsloth.convert.files import whole_folder
from jaxsloth.convert.fitting import check_cast
from jaxsloth.convert.peft_adapter import check_values
from jaxsloth.convert.safetensors_source import INDEX, SINGLE
from jaxsloth.models.names import lora_names, own_name, tensor_shapes, trainable_shapes
from jaxsloth.models.spec import ModelSpec

SHARD_BYTES = 4 << 30
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

    At most one shard is held in memory. The folder appears whole or not at all.

    Args:
        store: may say by name how a merged tensor is stored instead: as these tensors. config is then written with its
            quantization_config.

    Raises:
        ExistsError: the folder exists and overwrite is False.
        ValueError: values do not fit the spec, or the source is quantized (its rounding would be lost silently).
    """
    check_values(values, trainable_shapes(spec), "the adapter to merge")
    with whole_folder(Path(folder), overwrite=overwrite) as temporary:
        files: list[tuple[Path, list[str]]] = []
        shard: dict[str, np.ndarray] = {}
        for name in tensor_shapes(spec):
            merged = _merged(name, source, spec, values)
            stored = store(name, merged) if store is not None else None
            if stored is None:
                stored = {name: np.ascontiguousarray(check_cast(name, merged, _DTYPES[dtype]))}
            size = sum(tensor.nbytes for tensor in stored.values())
            if shard and sum(held.nbytes for held in shard.values()) + size > shard_bytes:
                files.append(_save(temporary, shard, len(files)))
                shard = {}
            shard |= stored
        files.append(_save(temporary, shard, len(files)))
        _name_files(temporary, files)
        left_out = ("quantization_config",) if store is None else ()
        plain = {key: value for key, value in config.items() if key not in left_out} | {"dtype": dtype}
        (temporary / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _merged(name: str, source: TensorSource, spec: ModelSpec, values: Mapping[str, np.ndarray]) -> np.ndarray:
    for trained, value in values.items():
        if own_name(trained) == name:
            return value
    tensor = source.read(name)
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"{name} is stored as NF4; merge into the 16-bit checkpoint that it was made from")
    a, b = lora_names(name.removesuffix(".weight"))
    if spec.lora is None or a not in values:
        return tensor
    return tensor.astype(np.float32) + np.float32(spec.lora.scale) * (values[b] @ values[a])


def _save(folder: Path, tensors: dict[str, np.ndarray], number: int) -> tuple[Path, list[str]]:
    file = folder / f"shard-{number}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    return file, list(tensors)


def _name_files(folder: Path, files: list[tuple[Path, list[str]]]) -> None:
    """Hugging Face's file names, which hold the number of shards, known only at the end; and the index."""
    if len(files) == 1:
        files[0][0].rename(folder / SINGLE)
        return
    where: dict[str, str] = {}
    total = 0
    for number, (file, names) in enumerate(files, start=1):
        final = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        total += file.stat().st_size
        file.rename(final)
        where.update(dict.fromkeys(names, final.name))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
