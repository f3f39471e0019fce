"""GGUF files of the llama architecture (llama.cpp), dequantized to float32 under Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.safetensors_source import CheckpointError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
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


class GgufSource:
    """A GGUF file as a TensorSource. Blocks of any ggml type that the gguf package knows are dequantized when read."""

    def __init__(self, path: Path) -> None:
        self._reader = _open(path)
        self.path = path
        fields = _fields(self._reader)
        architecture = fields.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path}: GGUF architecture must be 'llama', and it is {architecture!r}")
        self._heads = {"q_proj": int(fields["llama.attention.head_count"])}
        self._heads["k_proj"] = int(fields.get("llama.attention.head_count_kv", self._heads["q_proj"]))
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
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if match is None or match[2] not in _BLOCK:
        raise CheckpointError(f"{path}: tensor {name} belongs to no known part of a llama model")
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{kind}"


def gguf_config(path: Path) -> dict[str, Any]:
    """The file's metadata as a Hugging Face llama config.

    Raises:
        CheckpointError: another architecture, or metadata that a llama model needs is missing.
    """
    reader = _open(path)
    fields = _fields(reader)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: GGUF architecture must be 'llama', and it is {architecture!r}")

    def need(name: str) -> Any:
        if name not in fields:
            raise CheckpointError(f"{path}: the GGUF metadata lacks {name}")
        return fields[name]

    heads = int(need("llama.attention.head_count"))
    hidden = int(need("llama.embedding_length"))
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(need("llama.feed_forward_length")),
        "num_hidden_layers": int(need("llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(fields.get("llama.attention.key_length", hidden // heads)),
        "hidden_act": "silu",
        "max_position_embeddings": int(need("llama.context_length")),
        "rms_norm_eps": float(need("llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0))},
        "vocab_size": int(names["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    scaling = fields.get("llama.rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_parameters"] |= _rope_scaling(scaling, fields, path)
    elif "rope_freqs.weight" in names:
        factors = [float(factor) for factor in names["rope_freqs.weight"].data]
        # llama.cpp writes Llama 3.1's scaling out as the factor that each frequency is divided by: longrope's form.
        config["rope_parameters"] |= {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
        config["rope_parameters"] |= {"short_factor": factors, "long_factor": factors}
    return config


def _rope_scaling(kind: str, fields: dict[str, Any], path: Path) -> dict[str, Any]:
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{path}: rope scaling must be none, linear or yarn, and it is {kind!r}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(fields["llama.rope.scaling.factor"])}
    original = fields.get("llama.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _open(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path} is not a whole GGUF file (truncated or corrupt): {error}") from error


def _fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}
