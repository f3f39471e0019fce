"""GGUF files, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.fitting import Clamped
from jaxsloth.convert.gguf_families import family_of
from jaxsloth.convert.gguf_types import OutType, encode, fitting_type, stored_bytes
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.spec import ModelSpec


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: its names, `kind` (a ggml type) and what that takes on disk."""

    name: str
    hf_name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


def plan_tensors(spec: ModelSpec, kind: OutType) -> list[GgufTensor]:
    """What a model's file holds, in the model's order. Vectors are float32, as llama.cpp has them.

    Raises:
        ValueError: as `family_of`.
    """
    family = family_of(spec)
    found, layers, attention = [], len(spec.layers), spec.layers[0].attention
    groups = attention.heads // attention.kv_heads
    for name, shape in tensor_shapes(spec).items():
        own = family.ggml_name(name)
        layer, part = (int(own.split(".")[1]), own.split(".")[2]) if own.startswith("blk.") else (0, own.split(".")[0])
        if part == "token_embd" and spec.head.tied:
            part = "output"  # it is the head too
        stored = "F32" if len(shape) == 1 else fitting_type(kind.tensor_type(part, layer, layers, groups), shape[-1])
        found.append(GgufTensor(own, name, shape, stored, stored_bytes(stored, shape)))
    return found


def write_gguf(
    file: Path,
    tensors: list[GgufTensor],
    fields: Mapping[str, Any],
    values: Iterator[tuple[str, np.ndarray]],
    spec: ModelSpec,
    factors: Mapping[str, np.ndarray],
    clamped: Clamped | None = None,
) -> Iterator[int]:
    """Writes the file, and yields each tensor's bytes when they are written.

    Args:
        fields: metadata by name. values: (Hugging Face name, its value), in the order of `tensors`.
        spec: the model's. factors: tensors beside the model's, which come first. clamped: as `encode` takes it.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    family, attention = family_of(spec), spec.layers[0].attention
    heads = {"q_proj": attention.heads, "k_proj": attention.kv_heads} if family.permuted else {}
    writer = GGUFWriter(str(file), family.architecture)
    for name, value in fields.items():
        _add(writer, name, value)
    for name, value in factors.items():
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    for tensor in tensors:
        plain = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(tensor.kind)
        if plain is not None:
            writer.add_tensor_info(tensor.name, tensor.shape, plain, tensor.nbytes)
            continue
        packed = (*tensor.shape[:-1], tensor.nbytes // int(np.prod(tensor.shape[:-1])))
        writer.add_tensor_info(
            tensor.name, packed, np.dtype(np.uint8), tensor.nbytes, raw_dtype=GGMLQuantizationType[tensor.kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in factors.values():
        writer.write_tensor_data(value)
    for tensor, (name, value) in zip(tensors, values, strict=True):
        if name != tensor.hf_name:
            raise ValueError(f"{tensor.hf_name} must come next, got {name}")
        projection = name.split(".")[-2]
        if projection in heads:
            value = permute(value, heads[projection])
        elif family.norm_offset and family.is_norm(name):
            value = np.asarray(value, np.float32) + np.float32(family.norm_offset)
        writer.write_tensor_data(encode(value, tensor.kind, tensor.hf_name, clamped))
        yield tensor.nbytes
    writer.close()


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows; `gguf_source.unpermute` undoes it."""
    half = weight.shape[0] // heads // 2
    return np.ascontiguousarray(weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2)).reshape(weight.shape)


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
