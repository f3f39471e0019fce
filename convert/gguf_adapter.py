"""LoRA adapters as GGUF files, which llama.cpp applies to a model's file: read and written.

A matrix of a layer is two tensors, ``blk.0.attn_q.weight.lora_a`` [r, in] and ``….lora_b`` [out, r]; llama.cpp adds
``adapter.lora.alpha / r · B·A``. B's rows of q and k are in llama.cpp's order, as the weights' are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from jaxsloth.convert.adapter_rules import AdapterConfig
from jaxsloth.convert.fitting import Clamped
from jaxsloth.convert.gguf_config import open_gguf, values_of
from jaxsloth.convert.gguf_families import family_of
from jaxsloth.convert.gguf_source import unpermute
from jaxsloth.convert.gguf_types import encode
from jaxsloth.convert.gguf_writer import permute
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import Schema, shown, validated
from jaxsloth.models.names import linears, lora_names, own_name, trainable_shapes
from jaxsloth.models.spec import ModelSpec

OUT_TYPES = ("f32", "f16", "bf16")
_ENDINGS = (".weight.lora_a", ".weight.lora_b")
_SHOWN = 20


class _Fields(Schema):
    """An adapter's metadata. llama.cpp takes a scaling of 1 where alpha is 0."""

    architecture: str = Field(alias="general.architecture")
    type: str = Field(alias="adapter.type")
    alpha: Annotated[float, Field(ge=0, le=1e6)] = Field(0.0, alias="adapter.lora.alpha")


def is_gguf_adapter(path: Path) -> bool:
    """Whether a .gguf file says that it is an adapter."""
    if path.suffix != ".gguf" or not path.is_file():
        return False
    kind = open_gguf(path).fields.get("general.type")
    return kind is not None and kind.contents() == "adapter"


def gguf_adapter(path: Path, spec: ModelSpec) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """The file's adapter on a model: (its spec with the adapters, their values by PEFT's names, float32).

    Raises:
        CheckpointError: the file can't be read, or is no LoRA adapter of this model.
    """
    from gguf.quants import dequantize

    reader = open_gguf(path)
    fields, family = _fields(reader, path), family_of(spec)
    if fields.architecture != family.architecture:
        raise CheckpointError(
            f"{path}: general.architecture must be the base's, {family.architecture!r}, got {shown(fields.architecture)}"
        )
    known, heads = {linear.name: linear for linear in linears(spec)}, _permuted(spec)
    values: dict[str, np.ndarray] = {}
    strangers = []
    for tensor in reader.tensors:
        ending = next((ending for ending in _ENDINGS if tensor.name.endswith(ending)), None)
        module = None if ending is None else family.hf_name(tensor.name[: -len(".lora_a")], path).removesuffix(".weight")
        if module not in known:
            strangers.append(tensor.name)
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        projection = module.rpartition(".")[2]
        if ending == _ENDINGS[1] and projection in heads and shape[0] == known[module].out_features:
            value = unpermute(value, heads[projection])
        values[lora_names(module)[ending == _ENDINGS[1]]] = value
    if strangers:
        more = f", … ({len(strangers)} in all)" if len(strangers) > _SHOWN else ""
        raise CheckpointError(
            f"{path}: every tensor must be a linear layer's lora_a or lora_b; the model's blocks have no place for "
            f"{', '.join(strangers[:_SHOWN])}{more}"
        )
    return _config(fields, values, path).fitted(spec, values, str(path))


def _config(fields: _Fields, values: Mapping[str, np.ndarray], path: Path) -> AdapterConfig:
    """What PEFT would say of it: a rank a module."""
    modules = list(dict.fromkeys(own_name(name).rpartition(".lora_")[0] for name in values))
    ranks = {module: len(values[lora_names(module)[0]]) for module in modules if lora_names(module)[0] in values}
    if not ranks:
        raise CheckpointError(f"{path} holds no lora_a tensor")
    patterns = {re.escape(module): rank for module, rank in ranks.items()}
    alphas = None if fields.alpha > 0 else {name: float(rank) for name, rank in patterns.items()}
    r = max(ranks.values())
    return AdapterConfig(
        None, r, fields.alpha or float(r), 0.0, tuple(modules), False, "none", (), rank_pattern=patterns, alpha_pattern=alphas
    )


def describe_gguf_adapter(path: Path) -> dict[str, Any]:
    """What the file holds, under its own names, as JSON would."""
    reader = open_gguf(path)
    shapes = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in reader.tensors}
    return {
        "kind": "GGUF LoRA adapter",
        "path": str(path),
        "alpha": _fields(reader, path).alpha,
        "tensors": {tensor.name: {"shape": shapes[tensor.name], "dtype": tensor.tensor_type.name} for tensor in reader.tensors},
        "values": sum(int(np.prod(shape)) for shape in shapes.values()),
        "bytes": path.stat().st_size,
    }


def check_gguf_adapter(spec: ModelSpec, outtype: str) -> None:
    """ValueError where a spec's adapter is none that llama.cpp could apply."""
    assert spec.lora is not None
    if outtype not in OUT_TYPES:
        raise ValueError(f"outtype of a GGUF adapter must be one of {', '.join(OUT_TYPES)}; got {outtype!r}")
    family_of(spec)
    adapters = {name for module in spec.lora.modules for name in lora_names(module)}
    more = [own_name(name) for name in trainable_shapes(spec) if name not in adapters]
    if more:
        raise ValueError(
            f"a GGUF adapter holds LoRA matrices alone, and this adapter trains {', '.join(more[:_SHOWN])} too; merge it "
            "instead: --to gguf --merge"
        )


def write_gguf_adapter(
    file: Path, spec: ModelSpec, values: Mapping[str, np.ndarray], outtype: str, name: str, clamped: Clamped | None = None
) -> None:
    """Writes the adapter's file; values: every name of `trainable_shapes(spec)`.

    Raises:
        CheckpointError: a value is too large for the outtype, and `clamped` is none, in which they are counted.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    assert spec.lora is not None
    check_gguf_adapter(spec, outtype)
    family, heads = family_of(spec), _permuted(spec)
    writer = GGUFWriter(str(file), family.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", spec.lora.scale * spec.lora.r)
    writer.add_name(name)
    for module in spec.lora.modules:
        projection = module.rpartition(".")[2]
        for peft_name, ending in zip(lora_names(module), (".lora_a", ".lora_b"), strict=True):
            value = np.asarray(values[peft_name], np.float32)
            if ending == ".lora_b" and projection in heads:
                value = permute(value, heads[projection])
            own = family.ggml_name(f"{module}.weight") + ending
            encoded = encode(value, outtype.upper(), own, clamped)
            writer.add_tensor(own, encoded, raw_dtype=GGMLQuantizationType.BF16 if outtype == "bf16" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def adapter_bytes(shape: tuple[int, ...], outtype: str) -> int:
    return int(np.prod(shape)) * (4 if outtype == "f32" else 2)


def _permuted(spec: ModelSpec) -> dict[str, int]:
    """The heads of the projections whose rows llama.cpp has in another order."""
    attention = spec.layers[0].attention
    return {"q_proj": attention.heads, "k_proj": attention.kv_heads} if family_of(spec).permuted else {}


def _fields(reader: Any, path: Path) -> _Fields:
    wanted = {str(field.alias) for field in _Fields.model_fields.values()}
    fields = validated(_Fields, values_of(reader, wanted, path), path, CheckpointError)
    if fields.type != "lora":
        raise CheckpointError(f"{path}: adapter.type must be 'lora', got {shown(fields.type)}")
    return fields
