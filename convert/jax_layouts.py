"""Where a JAX tree holds a model's tensors: plain flax.nnx, MaxText's and Tunix's trees, each a list of leaves.

Derived from what the makers publish: MaxText's checkpoint_conversion (param_mapping.py, llama_or_mistral_ckpt.py) and rotary
embeddings; Tunix's models/llama3/params.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxsloth.backend import DtypeName
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.names import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix, tensor_shapes
from jaxsloth.models.spec import Attention, ModelSpec

Layout = Literal["orbax", "maxtext", "tunix"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# The folder of the tree beside config.json: MaxText's is a step's `items`, which load_parameters_path names.
FOLDERS: dict[Layout, str] = {"orbax": "params", "maxtext": "0/items", "tunix": "state"}
# Whose decoders MaxText's and Tunix's llama computes; others have the same tensors' names and compute otherwise (Gemma 1 adds
# 1 to its norms' weights, SmolLM3 turns no heads in some layers).
_LLAMAS = ("llama", "mistral")
# MaxText's LLaMARotaryEmbedding has these written into it, whatever the model's config says.
_MAXTEXT_SCALING = (8.0, 1.0, 4.0, 8192)
_TUNIX_THETA = 1_000_000  # what Tunix's llama3 turns by: its Attention does not hand its config's rope_theta on
_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class Change(NamedTuple):
    """A tensor's values on their way into a leaf, and back; views wherever that is possible."""

    into: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor's place in a leaf. index: of the leaf, () where it is the whole leaf."""

    name: str
    index: tuple[int | slice, ...]
    change: Change


@dataclass(frozen=True)
class Leaf:
    """An array of the tree, and what it is made of."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtype: DtypeName

    @property
    def values(self) -> int:
        return math.prod(self.shape)


_SAME = Change(lambda value: value, lambda value: value)
_TRANSPOSED = Change(lambda value: value.T, lambda value: value.T)


def leaves(spec: ModelSpec, layout: Layout, dtype: DtypeName) -> tuple[Leaf, ...]:
    """The leaves of a model's tree, in the order of its layers.

    Raises:
        CheckpointError: the layout has no place for some of the model's tensors, or its decoder computes otherwise.
    """
    if layout != "orbax" and spec.family not in _LLAMAS:
        raise CheckpointError(
            f"{layout}'s trees are known here of the families {' and '.join(_LLAMAS)}, got a {spec.family} model: its decoder "
            "there has other arrays, or computes otherwise with the same; take --to orbax, or --to hf and that project's own "
            "conversion"
        )
    reason = None if layout == "orbax" else _refusal(spec, layout)
    if reason is not None:
        raise CheckpointError(f"{layout}'s {spec.family} decoder {reason}; or take --to orbax, or --to hf")
    found = {"orbax": _nnx, "maxtext": _maxtext, "tunix": _tunix}[layout](spec, dtype)
    placed = {part.name for leaf in found for part in leaf.parts}
    left = [name for name in tensor_shapes(spec) if name not in placed]
    if left:
        raise CheckpointError(
            f"{layout}'s tree of {spec.family} models has no place for {len(left)} of the model's tensors: "
            f"{', '.join(left[:20])}{', …' if len(left) > 20 else ''}"
        )
    return found


def _refusal(spec: ModelSpec, layout: Layout) -> str | None:
    """What a llama's config asks for that the layout's decoder has not, and what to do; None where it has all."""
    attention, activation = spec.layers[0].attention, spec.layers[0].mlp.activation
    rope = attention.rope
    assert rope is not None
    if attention.window is not None and attention.window < spec.max_positions:
        return (
            f"has no windows, and this model sees {attention.window} of {spec.max_positions} positions (sliding_window); where "
            f"no text is longer than {attention.window} tokens, set sliding_window to null in config.json"
        )
    scaling = rope.scaling
    if scaling is not None and layout == "tunix":
        return (
            f"has no scaled rotary frequencies, and this model's are ({scaling.kind}); to compute without, as Tunix does, set "
            "rope_type to default in config.json"
        )
    if scaling is not None:
        numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
        if scaling.kind != "llama3" or numbers != _MAXTEXT_SCALING:
            said = numbers if scaling.kind == "llama3" else scaling.kind
            known = _shown(_MAXTEXT_SCALING)
            return f"has one scaling of rotary frequencies, Llama 3.1's ({known}), and this model's is {_shown(said)}"
    if activation != "silu":
        return f"computes silu in the MLP, and this model {activation} (hidden_act)"
    if rope.rotary_dim != attention.head_dim:
        return f"turns whole heads, and this model {rope.rotary_dim} of {attention.head_dim} values (partial_rotary_factor)"
    return None


def _shown(scaling: tuple[float | None, ...] | str) -> str:
    if isinstance(scaling, str):
        return scaling
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return ", ".join(f"{name} {value:g}" for name, value in zip(names, scaling, strict=True) if value is not None)


def _whole(path: tuple[str, ...], name: str, shape: tuple[int, ...], change: Change, dtype: DtypeName) -> Leaf:
    return Leaf(path, change.into(np.broadcast_to(np.int8(0), shape)).shape, (Part(name, (), change),), dtype)


def _nnx(spec: ModelSpec, dtype: DtypeName) -> tuple[Leaf, ...]:
    """Hugging Face's modules with the names that flax.nnx has for their parameters: Linear's kernel ``[in, out]``, Embed's
    embedding ``[vocab, hidden]``, RMSNorm's scale, biases."""
    found = []
    for name, shape in tensor_shapes(spec).items():
        *module, kind = name.split(".")
        own, change = kind, _SAME
        if kind == "weight" and len(shape) == 1:
            own = "scale"
        elif kind == "weight" and ".".join(module) == EMBEDDING:
            own = "embedding"
        elif kind == "weight":
            own, change = "kernel", _TRANSPOSED
        found.append(_whole((*module, own), name, shape, change, dtype))
    return tuple(found)


def _split(heads: int, head_dim: int) -> Change:
    """``[heads·head_dim, in]`` to ``[in, heads, head_dim]``."""
    return Change(lambda w: w.T.reshape(w.shape[1], heads, head_dim), lambda w: w.reshape(w.shape[0], heads * head_dim).T)


def _joined(heads: int, head_dim: int) -> Change:
    """An output projection, ``[out, heads·head_dim]`` to ``[heads, head_dim, out]``."""
    return Change(lambda w: w.T.reshape(heads, head_dim, w.shape[0]), lambda w: w.reshape(heads * head_dim, w.shape[2]).T)


def _projections(attention: Attention) -> dict[str, Change]:
    split = _split(attention.kv_heads, attention.head_dim)
    return {
        "q_proj": _split(attention.heads, attention.head_dim),
        "k_proj": split,
        "v_proj": split,
        "o_proj": _joined(attention.heads, attention.head_dim),
    }


def _tunix(spec: ModelSpec, dtype: DtypeName) -> tuple[Leaf, ...]:
    """tunix.models.llama3: an nnx.State, whose leaves end in `value`."""
    found = []
    shapes = tensor_shapes(spec)

    def add(path: str, name: str, change: Change = _SAME) -> None:
        if name in shapes:
            found.append(_whole((*path.split("."), "value"), name, shapes[name], change, dtype))

    add("embedder.input_embedding", f"{EMBEDDING}.weight")
    for index, layer in enumerate(spec.layers):
        prefix, own = layer_prefix(index), f"layers.{index}"
        for name in _NORMS:
            add(f"{own}.{name}.w", f"{prefix}.{name}.weight")
        for name, change in _projections(layer.attention).items():
            add(f"{own}.attn.{name}.w", f"{prefix}.self_attn.{name}.weight", change)
        for name in _MLP:
            add(f"{own}.mlp.{name}.kernel", f"{prefix}.mlp.{name}.weight", _TRANSPOSED)
    add("final_norm.w", f"{FINAL_NORM}.weight")
    add("lm_head.w", f"{LM_HEAD}.weight", _TRANSPOSED)
    return tuple(found)


def interleaves(spec: ModelSpec) -> bool:
    """Whether MaxText turns neighbouring pairs of a head's values (its rope_type llama3.1) and not its halves, as others do."""
    rope = spec.layers[0].attention.rope
    return rope is not None and rope.scaling is not None and rope.scaling.kind == "llama3"


def notes_on(spec: ModelSpec, layout: Layout, dtype: DtypeName) -> list[str]:
    """What a user must know to run the tree."""
    rope = spec.layers[0].attention.rope
    if layout == "tunix" and rope is not None and rope.theta != _TUNIX_THETA:
        return [
            f"this model's rotary base is {rope.theta:g}, and Tunix's llama3 as published passes none and takes "
            f"{_TUNIX_THETA:,}: compare its logits with the source's, and pass config.rope_theta to apply_rope if they differ"
        ]
    if layout != "maxtext":
        return []
    rope = "rope_type=llama3.1" if interleaves(spec) else "rope_type=default"
    tied = " logits_via_embedding=true normalize_embedding_logits=false" if spec.head.tied else ""
    found = [f"run MaxText with scan_layers=true {rope}{tied} load_parameters_path=DESTINATION/0/items"]
    head_dim = spec.layers[0].attention.head_dim
    kept = _scaled(head_dim, dtype)[1]
    if kept != dtype:
        found.append(f"queries are stored in float32: in {dtype}, the division by the root of {head_dim} would round them")
    elif dtype == "float32" and math.log2(head_dim) % 2:
        found.append(f"queries are divided by the root of {head_dim}, which rounds the last bit of float32 values")
    return found


def _maxtext(spec: ModelSpec, dtype: DtypeName) -> tuple[Leaf, ...]:
    """MaxText's scanned decoder: a layer's arrays stacked along axis 1; queries divided by the root of head_dim."""
    attention, shapes = spec.layers[0].attention, tensor_shapes(spec)
    changes = _projections(attention)
    if interleaves(spec):
        changes |= {name: _then(changes[name], _INTERLEAVED) for name in ("q_proj", "k_proj")}
    query, query_dtype = _scaled(attention.head_dim, dtype)
    changes["q_proj"] = _then(changes["q_proj"], query)
    blocks: dict[str, tuple[str, Change]] = {
        "pre_self_attention_layer_norm.scale": ("input_layernorm", _SAME),
        "post_self_attention_layer_norm.scale": ("post_attention_layernorm", _SAME),
        "mlp.wi_0.kernel": ("mlp.gate_proj", _TRANSPOSED),
        "mlp.wi_1.kernel": ("mlp.up_proj", _TRANSPOSED),
        "mlp.wo.kernel": ("mlp.down_proj", _TRANSPOSED),
    }
    for own, name in zip(("query", "key", "value", "out"), _PROJECTIONS, strict=True):
        blocks[f"self_attention.{own}.kernel"] = f"self_attn.{name}", changes[name]
    root = ("params", "params")
    table, head, norm = f"{EMBEDDING}.weight", f"{LM_HEAD}.weight", f"{FINAL_NORM}.weight"
    found = [_whole((*root, "token_embedder", "embedding"), table, shapes[table], _SAME, dtype)]
    for path, (name, change) in blocks.items():
        found.append(
            _stack(
                (*root, "decoder", "layers", *path.split(".")), name, spec, change, query_dtype if "query" in path else dtype
            )
        )
    if norm in shapes:
        found.append(_whole((*root, "decoder", "decoder_norm", "scale"), norm, shapes[norm], _SAME, dtype))
    if head in shapes:
        found.append(_whole((*root, "decoder", "logits_dense", "kernel"), head, shapes[head], _TRANSPOSED, dtype))
    return tuple(found)


def _stack(path: tuple[str, ...], name: str, spec: ModelSpec, change: Change, dtype: DtypeName) -> Leaf:
    names = [f"{layer_prefix(index)}.{name}.weight" for index in range(len(spec.layers))]
    shapes = tensor_shapes(spec)
    wrong = [one for one in names if shapes.get(one) != shapes.get(names[0])]
    if names[0] not in shapes or wrong:
        raise CheckpointError(
            f"maxtext's scanned layers must all have one {name} of one shape; got others in {wrong or names[:1]}"
        )
    first, *rest = _whole(path, names[0], shapes[names[0]], change, dtype).shape
    parts = tuple(Part(one, (slice(None), index), change) for index, one in enumerate(names))
    return Leaf(path, (first, len(names), *rest), parts, dtype)


def _then(first: Change, second: Change) -> Change:
    return Change(lambda w: second.into(first.into(w)), lambda w: first.back(second.back(w)))


_INTERLEAVED = Change(
    lambda w: np.stack(np.split(w, 2, axis=-1), axis=-1).reshape(w.shape),
    lambda w: np.concatenate((w[..., ::2], w[..., 1::2]), axis=-1),
)


def _scaled(head_dim: int, dtype: DtypeName) -> tuple[Change, DtypeName]:
    """Division by the root of head_dim, and the dtype that gives the same 16-bit values back: a power of two changes no bit of
    bfloat16 values; others are kept in float32."""
    exact = math.log2(head_dim) % 2 == 0 and dtype != "float16"
    into, back = np.float32(1 / math.sqrt(head_dim)), np.float32(math.sqrt(head_dim))
    change = Change(
        lambda w: (w.astype(np.float32) * into).astype(w.dtype), lambda w: (w.astype(np.float32) * back).astype(w.dtype)
    )
    return change, dtype if exact else "float32"
