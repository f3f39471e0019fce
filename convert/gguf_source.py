"""GGUF files of the llama architecture (llama.cpp), dequantized to float32 under Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import Count, Schema, Size, shown, validated

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tensors that hold no weight of the model: `gguf_config` turns these rope factors into the config's rope scaling.
_DERIVED = {"rope_freqs.weight"}


class GgufFields(Schema):
    """The metadata that a llama model needs."""

    head_count: Size = Field(alias="llama.attention.head_count")
    head_count_kv: Size | None = Field(None, alias="llama.attention.head_count_kv")
    embedding_length: Size = Field(alias="llama.embedding_length")
    feed_forward_length: Size = Field(alias="llama.feed_forward_length")
    block_count: Size = Field(alias="llama.block_count")
    key_length: Size | None = Field(None, alias="llama.attention.key_length")
    context_length: Size = Field(alias="llama.context_length")
    epsilon: float = Field(alias="llama.attention.layer_norm_rms_epsilon")
    freq_base: Annotated[float, Field(gt=1)] = Field(10000.0, alias="llama.rope.freq_base")
    scaling: str | None = Field(None, alias="llama.rope.scaling.type")
    scaling_factor: float | None = Field(None, alias="llama.rope.scaling.factor")
    original_context: Size | None = Field(None, alias="llama.rope.scaling.original_context_length")
    bos: Count | None = Field(None, alias="tokenizer.ggml.bos_token_id")
    eos: Count | None = Field(None, alias="tokenizer.ggml.eos_token_id")
    padding: Count | None = Field(None, alias="tokenizer.ggml.padding_token_id")


class GgufSource:
    """A GGUF file as a TensorSource. Blocks of any ggml type that the gguf package knows are dequantized when read."""

    def __init__(self, path: Path) -> None:
        self._reader = open_gguf(path)
        _check_layout(self._reader, path)
        self.path = path
        fields = _fields(self._reader, path)
        self._heads = {"q_proj": fields.head_count, "k_proj": fields.head_count_kv or fields.head_count}
        self._tensors = {hf_name(t.name, path): t for t in self._reader.tensors if t.name not in _DERIVED}

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))  # ggml counts from the fastest axis

    def read(self, name: str) -> np.ndarray:
        """float32, a fresh array."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(self.shape(name))
        projection = name.split(".")[-2]
        return unpermute(value, self._heads[projection]) if projection in self._heads else value

    def block_type(self, name: str) -> str:
        """The ggml type of a tensor's blocks."""
        return str(self._tensors[name].tensor_type.name)

    def tokens(self) -> int:
        """How many tokens the file's vocabulary has: rows of the embedding."""
        return self.shape("model.embed_tokens.weight")[0]

    def file_type(self) -> int | None:
        """general.file_type: llama.cpp's number of the kind of file, where it says one."""
        field = self._reader.fields.get("general.file_type")
        return None if field is None else int(field.contents())

    def tokenizer_fields(self) -> dict[str, Any]:
        """The file's own tokenizer metadata, for another GGUF file of the same model."""
        return {name: field.contents() for name, field in self._reader.fields.items() if name.startswith("tokenizer.")}

    def file_of(self, name: str) -> Path:
        del name
        return self.path

    def stored_as(self, name: str) -> str:
        """Blocks are dequantized to this."""
        del name
        return "F32"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k rows: it interleaves the two rotary halves of each head (pairs of neighbours
    rotate), Hugging Face keeps them apart (channel i rotates with i + head_dim / 2)."""
    half = weight.shape[0] // heads // 2
    return np.ascontiguousarray(weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2)).reshape(weight.shape)


def hf_name(name: str, path: Path) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    module, _, kind = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if match is None or match[2] not in BLOCK_NAMES:
        raise CheckpointError(f"{path}: tensor {name} belongs to no known part of a llama model")
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{kind}"


def gguf_config(path: Path) -> dict[str, Any]:
    """The file's metadata as a Hugging Face llama config.

    Raises:
        CheckpointError: another architecture, or metadata that a llama model needs is missing or wrong.
    """
    reader = open_gguf(path)
    fields = _fields(reader, path)
    heads, hidden = fields.head_count, fields.embedding_length
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
    if len(names["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{path}: tensor token_embd.weight must have two axes, got {names['token_embd.weight'].shape}")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields.feed_forward_length,
        "num_hidden_layers": fields.block_count,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.head_count_kv or heads,
        "head_dim": fields.key_length or hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields.context_length,
        "rms_norm_eps": fields.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": fields.freq_base},
        "vocab_size": int(names["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.bos,
        "eos_token_id": fields.eos,
        "pad_token_id": fields.padding,
    }
    if fields.scaling not in (None, "none"):
        config["rope_parameters"] |= _rope_scaling(fields, path)
    elif "rope_freqs.weight" in names:
        factors = [float(factor) for factor in names["rope_freqs.weight"].data]
        if not all(0 < factor < np.inf for factor in factors):
            raise CheckpointError(f"{path}: rope_freqs.weight must hold positive numbers, got {min(factors)} … {max(factors)}")
        # llama.cpp writes Llama 3.1's scaling out as the factor that each frequency is divided by: longrope's form.
        config["rope_parameters"] |= {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
        config["rope_parameters"] |= {"short_factor": factors, "long_factor": factors}
    return config


def _check_layout(reader: Any, path: Path) -> None:
    """That every tensor has bytes of its own, inside the file, where the file's alignment puts them."""
    end, before = int(reader.data_offset), "the header"
    size = path.stat().st_size
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset)
        if start < end:
            raise CheckpointError(f"{path}: tensor {tensor.name} must begin after {before}, at byte {end}, got {start}")
        if (start - int(reader.data_offset)) % int(reader.alignment):
            raise CheckpointError(f"{path}: tensor {tensor.name} must begin at a multiple of {reader.alignment} bytes")
        end, before = start + int(tensor.n_bytes), tensor.name
        if end > size:
            raise CheckpointError(f"{path}: tensor {tensor.name} must end in the file's {size} bytes, got {end}")


def _rope_scaling(fields: GgufFields, path: Path) -> dict[str, Any]:
    if fields.scaling not in ("linear", "yarn"):
        raise CheckpointError(f"{path}: llama.rope.scaling.type must be none, linear or yarn, got {fields.scaling!r}")
    scaling: dict[str, Any] = {"rope_type": fields.scaling, "factor": fields.scaling_factor}
    if fields.original_context is not None:
        scaling["original_max_position_embeddings"] = fields.original_context
    return scaling


def open_gguf(path: Path) -> Any:
    """The gguf package's reader of a file; CheckpointError where it is not whole."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # the gguf package reads offsets and counts as they come, and fails in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{path} is not a whole GGUF file (truncated or corrupt): {reason}") from error


def _fields(reader: Any, path: Path) -> GgufFields:
    wanted = {"general.architecture", "general.type", *(str(field.alias) for field in GgufFields.model_fields.values())}
    try:
        values = {name: field.contents() for name, field in reader.fields.items() if name in wanted}
    except Exception as error:
        raise CheckpointError(f"{path}: the GGUF metadata can't be read: {type(error).__name__}: {error}") from error
    if values.get("general.type") == "adapter":
        raise CheckpointError(f"{path} is an adapter, not a model; give the base, and this file as the adapter (--merge)")
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: general.architecture must be 'llama', got {shown(architecture)}")
    return validated(GgufFields, values, path, CheckpointError)
