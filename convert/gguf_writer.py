"""GGUF files of the llama architecture, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.gguf_source import BLOCK_NAMES, TOP_NAMES
from jaxsloth.convert.gguf_types import OutType, encode, fitting_type
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.rope import inverse_frequencies
from jaxsloth.models.spec import ModelSpec

_TOP = {hf: ggml for ggml, hf in TOP_NAMES.items()}
_BLOCK = {hf: ggml for ggml, hf in BLOCK_NAMES.items()}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: its names, `kind` (a ggml type) and what that takes on disk."""

    name: str
    hf_name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


def ggml_name(name: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``."""
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_BLOCK[rest]}.{kind}"


def check_family(spec: ModelSpec) -> None:
    """ValueError where llama.cpp's llama architecture would not run the model."""
    alike = all(block == spec.layers[0] for block in spec.layers)
    if spec.family != "llama" or not alike or spec.layers[0].attention.rope is None or spec.norm is None:
        raise ValueError(
            f"GGUF files are written for the llama family so far, and this model's is {spec.family}; save it merged "
            "(save_pretrained_merged, or --to hf --merge) and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )


def plan_tensors(spec: ModelSpec, kind: OutType) -> list[GgufTensor]:
    """What a model's file holds, in the model's order. Vectors are float32, as llama.cpp has them.

    Raises:
        ValueError: as `check_family`.
    """
    check_family(spec)
    found, layers = [], len(spec.layers)
    for name, shape in tensor_shapes(spec).items():
        own = ggml_name(name)
        layer, part = (int(own.split(".")[1]), own.split(".")[2]) if own.startswith("blk.") else (0, own.split(".")[0])
        if part == "token_embd" and spec.head.tied:
            part = "output"  # it is the head too
        stored = "F32" if len(shape) == 1 else fitting_type(kind.tensor_type(part, layer, layers), shape[-1])
        found.append(GgufTensor(own, name, shape, stored, _bytes(stored, shape)))
    return found


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // block * size


def model_fields(spec: ModelSpec, name: str, kind: OutType) -> dict[str, Any]:
    """The metadata that describes the model.

    Raises:
        ValueError: the model is none that llama.cpp's llama architecture can run.
    """
    check_family(spec)
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    assert attention.rope is not None and spec.norm is not None
    fields = {
        "general.name": name,
        "general.file_type": kind.file_type,
        "general.quantization_version": 2,
        "llama.block_count": len(spec.layers),
        "llama.context_length": spec.max_positions,
        "llama.embedding_length": spec.hidden,
        "llama.feed_forward_length": mlp.width,
        "llama.attention.head_count": attention.heads,
        "llama.attention.head_count_kv": attention.kv_heads,
        "llama.attention.key_length": attention.head_dim,
        "llama.attention.value_length": attention.head_dim,
        "llama.attention.layer_norm_rms_epsilon": spec.norm.eps,
        "llama.rope.freq_base": attention.rope.theta,
        "llama.rope.dimension_count": attention.rope.rotary_dim,
        "llama.vocab_size": spec.embedding.vocab,
    }
    scaling = attention.rope.scaling
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        fields |= {"llama.rope.scaling.type": scaling.kind, "llama.rope.scaling.factor": scaling.factor}
        if scaling.original_max_positions is not None:
            fields["llama.rope.scaling.original_context_length"] = scaling.original_max_positions
    elif scaling is not None and scaling.kind != "llama3":
        raise ValueError(f"a GGUF file has no {scaling.kind} rope scaling that llama.cpp would run as transformers does")
    return fields


def rope_factors(spec: ModelSpec) -> np.ndarray | None:
    """What each rotary frequency is divided by, float32: how llama.cpp stores Llama 3.1's scaling. None for other models."""
    rope = spec.layers[0].attention.rope
    if rope is None or rope.scaling is None or rope.scaling.kind != "llama3":
        return None
    scaled = np.asarray(inverse_frequencies(rope, max_positions=spec.max_positions, length=1)[0], np.float64)
    plain = rope.theta ** -(np.arange(0, rope.rotary_dim, 2) / rope.rotary_dim)
    return (plain / scaled).astype(np.float32)


def write_gguf(
    file: Path,
    tensors: list[GgufTensor],
    fields: Mapping[str, Any],
    values: Iterator[tuple[str, np.ndarray]],
    heads: tuple[int, int],
    factors: np.ndarray | None,
) -> Iterator[int]:
    """Writes the file, and yields each tensor's bytes when they are written.

    Args:
        fields: metadata by name. values: (Hugging Face name, its value), in the order of `tensors`.
        heads: query and key heads, whose rows llama.cpp keeps in another order.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    for name, value in fields.items():
        _add(writer, name, value)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
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
    if factors is not None:
        writer.write_tensor_data(factors)
    for tensor, (name, value) in zip(tensors, values, strict=True):
        if name != tensor.hf_name:
            raise ValueError(f"{tensor.hf_name} must come next, got {name}")
        value = np.asarray(value, np.float32)
        projection = name.split(".")[-2]
        if projection in ("q_proj", "k_proj"):
            value = permute(value, heads[projection == "k_proj"])
        writer.write_tensor_data(encode(value, tensor.kind))
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
