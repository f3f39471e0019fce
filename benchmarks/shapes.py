"""Model shapes with random weights, for measurements that need real sizes and no checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import ModelSpec

_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,  # the ids of the minimal tokenizer in benchmarks.checkpoint
    "eos_token_id": 2,
    "pad_token_id": 3,
    "dtype": "bfloat16",
}
_ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_GEMMA2 = {
    **_GELU,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA3 = {
    **_GELU,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10000.0,
}


def _family(
    kind: str, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, theta: float
) -> dict[str, Any]:
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rope_theta": theta,
        "rms_norm_eps": 1e-6,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA3,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,  # whole NF4 blocks a row: bitsandbytes 0.50.2 dequantizes others wrongly on a CPU
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "3b": {
        **_LLAMA3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen2.5_7b": {
        **_LLAMA3,
        **_family("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 1e6),
    },
    "qwen3_8b": {
        **_LLAMA3,
        **_family("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 1e6),
    },
    "gemma2_9b": {
        **_LLAMA3,
        **_family("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, 1e4),
        **_GEMMA2,
    },
    "gemma3_4b": {
        **_LLAMA3,
        **_family("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, 1e6),
        **_GEMMA3,
    },
}
# What turns a Llama shape into another family's, its sizes kept: a step with the one feature more.
VARIANTS: dict[str, dict[str, Any]] = {
    "bias": {"attention_bias": True, "mlp_bias": True},
    "qk_norm": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "sandwich": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **_GEMMA2, "query_pre_attn_scalar": 128},
}


def shape_config(name: str) -> dict[str, Any]:
    """The Hugging Face config of a named shape: "tiny", "1b" and "3b" (Llama-3.2's with an untied head), "8b" (Llama-3.1-8B) or
    another family's ("qwen3_8b"); a number of layers may follow, as in "8b-4", or one of `VARIANTS`, as in "3b-bias"."""
    base, _, more = name.partition("-")
    if base not in CONFIGS or not (more in ("", *VARIANTS) or more.isdigit()):
        raise ValueError(
            f"shape must be one of {sorted(CONFIGS)}, perhaps with a number of layers ('8b-4') or one of {sorted(VARIANTS)} "
            f"('3b-bias'), not {name!r}"
        )
    return CONFIGS[base] | ({"num_hidden_layers": int(more)} if more.isdigit() else VARIANTS.get(more, {}))


def shape_spec(name: str) -> ModelSpec:
    """The spec of `shape_config`."""
    return spec_from_config(shape_config(name))


class RandomSource:
    """A TensorSource of bfloat16 weights ~ N(0, 0.02²), embeddings ~ N(0, 1) behind their scale (norms and biases: ones; norms
    that add one to their weight: zeros), the same for a name every time.

    What adds to the residual stream, o_proj and down_proj, is smaller by the number of terms, 2·layers, so that the stream
    stays near what the embeddings made of it: else each layer amplifies bfloat16's rounding of the one before, and two right
    backward passes look unlike. (16 layers 512 wide of this gain on a CPU: a layer's gradients 4.4e-2 apart with embeddings of
    0.02 and GPT-2's √(2·layers); 32 layers of these weights: 1.2e-2.) Values are drawn from pools of 2²² normals, rolled by the
    name, since drawing billions takes minutes.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self._shapes = tensor_shapes(spec)
        # The embeddings' own pool: rows of a weight that are rows of theirs would meet them everywhere in the stream.
        words, normals = (np.random.Generator(np.random.Philox(key)).normal(size=1 << 22) for key in (seed + 1, seed))
        self._embeddings = (words / spec.embedding.scale).astype(ml_dtypes.bfloat16)
        self._norm = 1.0 - (0.0 if spec.norm is None else spec.norm.weight_offset)
        self._pool = (0.02 * normals).astype(ml_dtypes.bfloat16)
        self._small = (0.02 / (2 * len(spec.layers)) * normals).astype(ml_dtypes.bfloat16)

    def names(self) -> Sequence[str]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        return np.concatenate(list(self.pieces(name))).reshape(self._shapes[name])

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The flat values in order, as views: nothing the size of a weight is made."""
        shape = self._shapes[name]
        if len(shape) == 1:
            yield np.full(shape, self._norm, ml_dtypes.bfloat16)
            return
        pool = self._pool
        if name.endswith("embed_tokens.weight"):
            pool = self._embeddings
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            pool = self._small
        left = math.prod(shape)
        start = -(hash(shape) + len(name) * 7919 + sum(name.encode()) * 104729) % pool.size
        while left:
            piece = pool[start : start + left]
            yield piece
            left, start = left - piece.size, 0
