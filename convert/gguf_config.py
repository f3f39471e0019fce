"""A GGUF file's metadata, checked, and as the Hugging Face config of the same model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field

from jaxsloth.convert.gguf_families import NO_ROPE_EVERY, GgufFamily, architecture_family
from jaxsloth.convert.gguf_fields import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, yarn_attention
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import Count, Positive, Schema, Size, validated

_KEYS = {
    "head_count": "attention.head_count",
    "head_count_kv": "attention.head_count_kv",
    "embedding_length": "embedding_length",
    "feed_forward_length": "feed_forward_length",
    "block_count": "block_count",
    "key_length": "attention.key_length",
    "context_length": "context_length",
    "epsilon": "attention.layer_norm_rms_epsilon",
    "freq_base": "rope.freq_base",
    "freq_base_swa": "rope.freq_base_swa",
    "dimension_count": "rope.dimension_count",
    "scaling": "rope.scaling.type",
    "scaling_factor": "rope.scaling.factor",
    "original_context": "rope.scaling.original_context_length",
    "attn_factor": "rope.scaling.attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "sliding_window": "attention.sliding_window",
    "swa_period": "attention.sliding_window_pattern",
    "attn_soft_cap": "attn_logit_softcapping",
    "final_soft_cap": "final_logit_softcapping",
}
_TOKENS = {"bos": "bos", "eos": "eos", "padding": "padding"}
# What llama.cpp takes where a Gemma 2 or 3 file does not say.
_WINDOW, _CAPS, _NEAR_THETA = 4096, (50.0, 30.0), 10000.0
Theta = Annotated[float, Field(gt=1)]


class GgufFields(Schema):
    """The metadata of a model, under the names of `_KEYS`."""

    head_count: Size
    head_count_kv: Size | None = None
    embedding_length: Size
    feed_forward_length: Size
    block_count: Size
    key_length: Size | None = None
    context_length: Size
    epsilon: float
    freq_base: Theta = 10000.0
    freq_base_swa: Theta | None = None
    dimension_count: Size | None = None
    scaling: str | None = None
    scaling_factor: float | None = None
    original_context: Size | None = None
    attn_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    sliding_window: Count | None = None
    swa_period: Size | None = None
    attn_soft_cap: Positive | None = None
    final_soft_cap: Positive | None = None
    bos: Count | None = None
    eos: Count | None = None
    padding: Count | None = None


@cache
def _schema(architecture: str) -> type[GgufFields]:
    """The fields under an architecture's keys, by which errors name them."""
    aliases = {name: f"{architecture}.{key}" for name, key in _KEYS.items()}
    aliases |= {name: f"tokenizer.ggml.{key}_token_id" for name, key in _TOKENS.items()}
    settings = ConfigDict(alias_generator=lambda name: aliases[name])
    return type("GgufFields", (GgufFields,), {"model_config": settings, "__module__": __name__})


@cache
def _reader_class() -> Any:
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        """The gguf package's reader makes arrays of every element of an array: 10 s for a vocabulary of 128,000. Here the
        strings of an array are views of the file, and its numbers one array."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if GGUFValueType(raw_type) != GGUFValueType.ARRAY or self.byte_order == "S":
                return super()._get_field_parts(orig_offs, raw_type)
            item, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            kind, start = GGUFValueType(int(item[0])), orig_offs + 12
            number = self.gguf_scalar_to_np.get(kind)
            types = [GGUFValueType.ARRAY, kind]
            if number is not None:
                values = self._get(start, number, int(count[0]))
                if len(values) != count[0]:
                    raise ValueError(f"an array of {count[0]} numbers ends behind the file")
                return 12 + values.nbytes, [item, count, values], [2], types
            if kind != GGUFValueType.STRING:
                return super()._get_field_parts(orig_offs, raw_type)
            whole, end = memoryview(self.data), start  # type: ignore[arg-type]
            parts: list[Any] = [item, count]
            for _ in range(int(count[0])):
                begin = end + 8
                end = begin + int.from_bytes(whole[end:begin], "little")
                if end > len(whole):
                    raise ValueError(f"an array of {count[0]} strings ends behind the file")
                parts.append(whole[begin:end])
            return end - orig_offs, parts, list(range(2, len(parts))), types

    return Reader


def open_gguf(path: Path) -> Any:
    """The gguf package's reader of a file; CheckpointError where it is not whole."""
    try:
        return _reader_class()(path)
    except Exception as error:  # the gguf package reads offsets and counts as they come, and fails in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{path} is not a whole GGUF file (truncated or corrupt): {reason}") from error


def read_fields(reader: Any, path: Path) -> tuple[GgufFamily, GgufFields]:
    """A model file's family and metadata; CheckpointError where they are wrong, or missing."""
    general = values_of(reader, ("general.architecture", "general.type"), path)
    if general.get("general.type") == "adapter":
        raise CheckpointError(f"{path} is an adapter, not a model; give the base, and this file as the adapter (--merge)")
    family = architecture_family(general.get("general.architecture"), path)
    schema = _schema(family.architecture)
    wanted = [f"{family.architecture}.{key}" for key in _KEYS.values()]
    wanted += [f"tokenizer.ggml.{key}_token_id" for key in _TOKENS.values()]
    return family, validated(schema, values_of(reader, wanted, path), path, CheckpointError)


def values_of(reader: Any, wanted: Any, path: Path) -> dict[str, Any]:
    """The fields of those names that the file has."""
    try:
        return {name: field.contents() for name, field in reader.fields.items() if name in wanted}
    except Exception as error:  # the gguf package fails in any way on what it does not expect
        raise CheckpointError(f"{path}: the GGUF metadata can't be read: {type(error).__name__}: {error}") from error


def gguf_config(path: Path) -> dict[str, Any]:
    """The file's metadata as a Hugging Face config of its family.

    Raises:
        CheckpointError: another architecture, or metadata that such a model needs is missing or wrong.
    """
    reader = open_gguf(path)
    family, fields = read_fields(reader, path)
    heads, hidden = fields.head_count, fields.embedding_length
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
    if len(tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{path}: tensor token_embd.weight must have two axes, got {tensors['token_embd.weight'].shape}")
    head_dim = fields.key_length or hidden // heads
    config = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": fields.feed_forward_length,
        "num_hidden_layers": fields.block_count,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.head_count_kv or heads,
        "head_dim": head_dim,
        "hidden_act": "silu" if family.activation == "silu" else "gelu_pytorch_tanh",
        "max_position_embeddings": fields.context_length,
        "rms_norm_eps": fields.epsilon,
        "rope_parameters": _rope(fields, tensors, path),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.bos,
        "eos_token_id": fields.eos,
        "pad_token_id": fields.padding,
    }
    if family.biases == frozenset(("qkv", "out", "mlp")):
        config |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    return config | _family_config(family, fields, head_dim)


def _family_config(family: GgufFamily, fields: GgufFields, head_dim: int) -> dict[str, Any]:
    """What a family's config says beside."""
    if family.architecture == "phi3":
        part = (fields.dimension_count or head_dim) / head_dim
        return {"partial_rotary_factor": part, "sliding_window": fields.sliding_window or None}
    if family.architecture == "smollm3":
        return {"no_rope_layer_interval": NO_ROPE_EVERY, "use_sliding_window": False}
    if family.swa_period is None:
        return {"sliding_window": None} if family.architecture.startswith("qwen") else {}
    layers, window = fields.block_count, fields.sliding_window
    if family.architecture == "gemma2":
        window = _WINDOW if window is None else window
    period = (fields.swa_period or family.swa_period) if window else 1
    slides = [index % period < period - 1 for index in range(layers)]
    scale = family.attention_scale(layers, fields.embedding_length, fields.head_count, head_dim)
    found = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scale**-2),
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if family.architecture == "gemma2":
        found |= {"attn_logit_softcapping": fields.attn_soft_cap or _CAPS[0]}
        found |= {"final_logit_softcapping": fields.final_soft_cap or _CAPS[1]}
    return found


def _rope(fields: GgufFields, tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    far: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.freq_base}
    if SHORT_FACTORS in tensors and LONG_FACTORS in tensors:
        far |= {"rope_type": "longrope", "factor": 1.0, "attention_factor": fields.attn_factor or 1.0}
        far |= {"short_factor": _factors(tensors, SHORT_FACTORS, path), "long_factor": _factors(tensors, LONG_FACTORS, path)}
        far |= {"original_max_position_embeddings": fields.original_context or fields.context_length}
    elif fields.scaling not in (None, "none"):
        far |= _scaling(fields, path)
    elif ROPE_FACTORS in tensors:
        factors = _factors(tensors, ROPE_FACTORS, path)
        # llama.cpp writes Llama 3.1's scaling out as the factor that each frequency is divided by: longrope's form.
        far |= {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
        far |= {"short_factor": factors, "long_factor": factors}
    if not isinstance(fields, _schema("gemma3")):
        return far
    near = {"rope_type": "default", "rope_theta": fields.freq_base_swa or _NEAR_THETA}
    return {"sliding_attention": near, "full_attention": far}


def _factors(tensors: dict[str, Any], name: str, path: Path) -> list[float]:
    factors = [float(factor) for factor in tensors[name].data]
    if not all(0 < factor < np.inf for factor in factors):
        raise CheckpointError(f"{path}: {name} must hold positive numbers, got {min(factors)} … {max(factors)}")
    return factors


def _scaling(fields: GgufFields, path: Path) -> dict[str, Any]:
    if fields.scaling not in ("linear", "yarn"):
        key = type(fields).model_fields["scaling"].alias
        raise CheckpointError(f"{path}: {key or 'rope.scaling.type'} must be none, linear or yarn, got {fields.scaling!r}")
    scaling: dict[str, Any] = {"rope_type": fields.scaling, "factor": fields.scaling_factor}
    if fields.original_context is not None:
        scaling["original_max_position_embeddings"] = fields.original_context
    if fields.scaling == "yarn":
        scaling |= {name: getattr(fields, name) for name in ("beta_fast", "beta_slow") if getattr(fields, name) is not None}
        if fields.attn_factor is not None and fields.scaling_factor is not None:
            scaling["attention_factor"] = fields.attn_factor * yarn_attention(fields.scaling_factor)
    return scaling
