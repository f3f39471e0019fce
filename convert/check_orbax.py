"""Orbax trees read by plain orbax and put back by the paths that docs/convert.md documents, without this project's loader: what
a check compares. The paths are stated a second time here, so that a fault in `jax_layouts` shows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.orbax_source import find_tree
from jaxsloth.convert.safetensors_source import CheckpointError

_TOP = {
    "embedder.input_embedding": "model.embed_tokens",
    "final_norm.w": "model.norm",
    "lm_head.w": "lm_head",
    "token_embedder.embedding": "model.embed_tokens",
    "decoder.decoder_norm.scale": "model.norm",
    "decoder.logits_dense.kernel": "lm_head",
}
_TUNIX = {f"attn.{name}_proj.w": f"self_attn.{name}_proj" for name in "qkvo"}
_TUNIX |= {f"mlp.{name}_proj.kernel": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_TUNIX |= {f"{name}_layernorm.w": f"{name}_layernorm" for name in ("input", "post_attention")}
_MAXTEXT = {
    "self_attention.query.kernel": "self_attn.q_proj",
    "self_attention.key.kernel": "self_attn.k_proj",
    "self_attention.value.kernel": "self_attn.v_proj",
    "self_attention.out.kernel": "self_attn.o_proj",
    "mlp.wi_0.kernel": "mlp.gate_proj",
    "mlp.wi_1.kernel": "mlp.up_proj",
    "mlp.wo.kernel": "mlp.down_proj",
    "pre_self_attention_layer_norm.scale": "input_layernorm",
    "post_self_attention_layer_norm.scale": "post_attention_layernorm",
}


def orbax_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors of an orbax folder, as its tree says, in the tree's dtypes.

    Raises:
        CheckpointError: orbax can't read it, or a path is none that is documented.
    """
    import orbax.checkpoint as ocp

    place = find_tree(folder)
    if place is None:
        raise CheckpointError(f"{folder} holds no orbax tree")
    try:
        tree = ocp.PyTreeCheckpointer().restore(place.absolute())
    except Exception as error:  # another project's reader fails in its own ways
        raise CheckpointError(f"{place}: orbax can't read it: {type(error).__name__}: {error}") from error
    found = {}
    for path, value in _leaves(tree):
        for name, tensor in _named(path, np.asarray(value), config):
            if name in found:
                raise CheckpointError(f"{place}: {path} is {name} a second time")
            found[name] = tensor
    return found


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield ".".join(path).removesuffix(".value").removeprefix("params.").removeprefix("params."), tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*path, str(key)))


def _named(path: str, value: np.ndarray, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that a leaf holds: one, or of MaxText's stacks one a layer."""
    if path in _TOP:
        yield f"{_TOP[path]}.weight", value.T if _TOP[path] == "lm_head" else value
        return
    tunix, maxtext = re.fullmatch(r"layers\.(\d+)\.(.+)", path), path.removeprefix("decoder.layers.")
    if tunix and tunix[2] in _TUNIX:
        yield f"model.layers.{tunix[1]}.{_TUNIX[tunix[2]]}.weight", _matrix(value, joined=".o_proj" in tunix[2])
    elif maxtext in _MAXTEXT:
        own, head_dim = _MAXTEXT[maxtext], value.shape[-1]
        for layer in range(value.shape[1]):
            part = value[:, layer]
            if own.endswith(("q_proj", "k_proj")) and _turns_neighbours(config):
                part = np.concatenate((part[..., ::2], part[..., 1::2]), -1)
            if own.endswith("q_proj"):
                part = part.astype(np.float32) * np.float32(head_dim**0.5)
            yield f"model.layers.{layer}.{own}.weight", _matrix(part, joined=own.endswith("o_proj"))
    else:
        module, _, kind = path.rpartition(".")
        if kind not in ("kernel", "embedding", "scale", "bias") or not module:
            raise CheckpointError(f"the tree's path {path} is none that docs/convert.md has")
        yield f"{module}.{'bias' if kind == 'bias' else 'weight'}", value.T if kind == "kernel" else value


def _matrix(value: np.ndarray, *, joined: bool) -> np.ndarray:
    """``[in, heads, head_dim]``, or joined ``[heads, head_dim, out]``, or ``[in, out]``, as ``[out, in]``; vectors stay."""
    if value.ndim == 3:
        value = value.reshape(-1, value.shape[2]) if joined else value.reshape(value.shape[0], -1)
    return value.T


def _turns_neighbours(config: Mapping[str, Any]) -> bool:
    """MaxText's rope_type llama3.1."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (rope.get("rope_type") or rope.get("type")) == "llama3"
