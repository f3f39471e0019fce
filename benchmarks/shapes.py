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
}


def shape_config(name: str) -> dict[str, Any]:
    """The Hugging Face config of a named shape: "tiny", "1b" and "3b" (Llama-3.2's with an untied head) or "8b" (Llama-3.1-8B);
    a number of layers may follow, as in "8b-4", or "bias": biases on the linear layers."""
    base, _, more = name.partition("-")
    if base not in CONFIGS or not (more in ("", "bias") or more.isdigit()):
        raise ValueError(f"shape must be one of {sorted(CONFIGS)}, perhaps with a number of layers ('8b-4'), not {name!r}")
    changes = {"num_hidden_layers": int(more)} if more.isdigit() else dict.fromkeys(["attention_bias", "mlp_bias"], more != "")
    return CONFIGS[base] | changes


def shape_spec(name: str) -> ModelSpec:
    """The spec of `shape_config`."""
    return spec_from_config(shape_config(name))


class RandomSource:
    """A TensorSource of bfloat16 weights ~ N(0, 0.02²), embeddings ~ N(0, 1) (norms: ones), the same for a name every time.

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
        self._embeddings = words.astype(ml_dtypes.bfloat16)
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
            yield np.ones(shape, ml_dtypes.bfloat16)
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
