"""The families as llama.cpp has them: architecture, tensor names, what is stored in another way, and what it can't compute."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import shown
from jaxsloth.models.spec import ActivationName, ModelSpec

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_FUSED = {ggml: hf for ggml, hf in _BLOCK.items() if ggml not in ("attn_q", "attn_k", "attn_v", "ffn_gate")} | _FUSED


@dataclass(frozen=True)
class GgufFamily:
    """A family's place in GGUF.

    architecture: llama.cpp's name, with which its metadata keys begin. model_type, hf_class: of the config that a file is read
    as. permuted: the rows of q and k stand as neighbours rotate. norm_offset: added to the weights of norms that are stored.
    tied: the head is always the embedding. biases: of which parts ("qkv", "out", "mlp") it can have. scalings: of the rotary
    frequencies. swa_period: layer i has a window where ``i % period < period - 1``, unless the file says another period; None:
    llama.cpp gives no layer a window. large: the number of layers at which q·k is scaled by the root of hidden / heads.
    """

    architecture: str
    model_type: str
    hf_class: str
    blocks: Mapping[str, str]
    permuted: bool = False
    norm_offset: float = 0.0
    tied: bool = False
    activation: ActivationName = "silu"
    biases: frozenset[str] = frozenset()
    scalings: frozenset[str] = frozenset(("linear", "yarn"))
    swa_period: int | None = None
    large: int | None = None

    def hf_name(self, name: str, path: Path) -> str:
        """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; CheckpointError where there is no such."""
        module, _, kind = name.rpartition(".")
        if module in TOP_NAMES:
            return f"{TOP_NAMES[module]}.{kind}"
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if match is None or match[2] not in self.blocks:
            raise CheckpointError(f"{path}: tensor {name} belongs to no known part of a {self.architecture} model")
        return f"model.layers.{match[1]}.{self.blocks[match[2]]}.{kind}"

    def ggml_name(self, name: str) -> str:
        """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``."""
        module, _, kind = name.rpartition(".")
        top = {hf: ggml for ggml, hf in TOP_NAMES.items()}
        if module in top:
            return f"{top[module]}.{kind}"
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{next(ggml for ggml, hf in self.blocks.items() if hf == rest)}.{kind}"

    def is_norm(self, name: str) -> bool:
        """Whether a tensor of this Hugging Face name is a norm's weight."""
        return name.endswith("norm.weight")

    def attention_scale(self, layers: int, hidden: int, heads: int, head_dim: int) -> float:
        """What llama.cpp multiplies q·k by."""
        return (hidden / heads if layers == self.large else head_dim) ** -0.5


_GEMMA = {"norm_offset": 1.0, "activation": "gelu_tanh"}
# By the name of our family.
_FAMILIES = {
    "llama": GgufFamily(
        *("llama", "llama", "LlamaForCausalLM", _BLOCK),
        permuted=True,
        biases=frozenset(("qkv", "out", "mlp")),
        scalings=frozenset(("linear", "yarn", "llama3")),
    ),
    "qwen2": GgufFamily("qwen2", "qwen2", "Qwen2ForCausalLM", _BLOCK, biases=frozenset(("qkv",))),
    "qwen3": GgufFamily("qwen3", "qwen3", "Qwen3ForCausalLM", _BLOCK | _QK_NORMS),
    "gemma": GgufFamily("gemma", "gemma", "GemmaForCausalLM", _BLOCK, tied=True, **_GEMMA),
    "gemma2": GgufFamily(
        "gemma2", "gemma2", "Gemma2ForCausalLM", _BLOCK | _SANDWICH, tied=True, swa_period=2, large=46, **_GEMMA
    ),
    "gemma3_text": GgufFamily(
        *("gemma3", "gemma3_text", "Gemma3ForCausalLM", _BLOCK | _SANDWICH | _QK_NORMS), swa_period=6, large=62, **_GEMMA
    ),
    "phi3": GgufFamily("phi3", "phi3", "Phi3ForCausalLM", _FUSED, scalings=frozenset(("linear", "yarn", "longrope"))),
    "smollm3": GgufFamily("smollm3", "smollm3", "SmolLM3ForCausalLM", _BLOCK, permuted=True),
}
# Mistral's models are llama to llama.cpp, and to us where they come from a file.
_BY_SPEC = _FAMILIES | {"mistral": _FAMILIES["llama"]}
_BY_ARCHITECTURE = {family.architecture: family for family in _FAMILIES.values()}
NO_ROPE_EVERY = 4  # SmolLM3's layers without rotary positions, which llama.cpp counts by itself


def architecture_family(architecture: object, path: Path) -> GgufFamily:
    """The family of a file's general.architecture; CheckpointError where it is none of ours."""
    if not isinstance(architecture, str) or architecture not in _BY_ARCHITECTURE:
        raise CheckpointError(
            f"{path}: general.architecture must be one of {', '.join(_BY_ARCHITECTURE)}, got {shown(architecture)}"
        )
    return _BY_ARCHITECTURE[architecture]


def family_of(spec: ModelSpec) -> GgufFamily:
    """The family that a model is written as.

    Raises:
        ValueError: llama.cpp would not compute what the model does; the message says why.
    """
    family = _BY_SPEC.get(spec.family)
    reason = f"llama.cpp has no {spec.family} models" if family is None else _refusal(spec, family)
    if family is None or reason is not None:
        raise ValueError(f"this {spec.family} model can't be written as GGUF: {reason}; keep it as safetensors (--to hf)")
    return family


def _refusal(spec: ModelSpec, family: GgufFamily) -> str | None:
    """What of a model llama.cpp's architecture has not; None where it has all."""
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    has = {"qkv": attention.qkv_bias, "out": attention.out_bias, "mlp": mlp.bias}
    scale = family.attention_scale(len(spec.layers), spec.hidden, attention.heads, attention.head_dim)
    own = f"its {family.architecture} architecture"
    strangers = sorted(part for part, there in has.items() if there and part not in family.biases)
    if strangers:
        return f"{own} has no biases in {' and '.join(strangers)}"
    if mlp.activation != family.activation:
        return f"{own} computes {family.activation} in the MLP, not {mlp.activation}"
    if family.tied and not spec.head.tied:
        return f"{own} takes the embedding for the head, and this model has a head of its own"
    if not math.isclose(attention.scale, scale, rel_tol=1e-6):
        return f"{own} scales q·k by {scale:g}, and this model by {attention.scale:g} (query_pre_attn_scalar)"
    if spec.family == "phi3" and attention.heads * attention.head_dim != spec.hidden:
        return f"{own} has heads that are hidden_size ({spec.hidden}) wide together, not {attention.heads * attention.head_dim}"
    caps = (attention.soft_cap, spec.head.soft_cap)
    if (spec.family == "gemma2") != all(cap is not None for cap in caps) or (spec.family != "gemma2" and any(caps)):
        return f"{own} {'always' if spec.family == 'gemma2' else 'never'} has soft caps, and this model's are {caps}"
    return _rope_refusal(spec, family, own) or _window_refusal(spec, family, own)


def _rope_refusal(spec: ModelSpec, family: GgufFamily, own: str) -> str | None:
    windows = [layer.attention.window for layer in spec.layers]
    ropes = [layer.attention.rope for layer in spec.layers]
    for index, (window, rope) in enumerate(zip(windows, ropes, strict=True)):
        wanted = family.architecture != "smollm3" or (index + 1) % NO_ROPE_EVERY != 0
        if (rope is not None) != wanted:
            return f"{own} has {'no ' if not wanted else ''}rotary positions in layer {index}, unlike this model"
        if rope is None:
            continue
        near = family.architecture == "gemma3" and window is not None
        kinds = frozenset() if near else family.scalings
        scaling = rope.scaling
        if scaling is not None and scaling.kind not in kinds and not (is_plain_factors(spec) and "llama3" in kinds):
            return f"{own} has no {scaling.kind} rope scaling{' in layers with windows' if near else ''}"
        if scaling is not None and scaling.kind == "yarn" and not scaling.truncate:
            return f"{own} rounds the band of yarn's channels (truncate), and this model does not"
    if len({rope for rope in ropes if rope is not None}) > (2 if family.architecture == "gemma3" else 1):
        return f"{own} has one rope for all its layers"
    return None


def _window_refusal(spec: ModelSpec, family: GgufFamily, own: str) -> str | None:
    if family.swa_period is not None and swa_period(spec) is None:
        return f"{own} has windows in all layers but every n-th, and this model has them elsewhere"
    return None


def swa_period(spec: ModelSpec) -> int | None:
    """The period n with windows of one size in all layers but every n-th (1: nowhere); None where there is none."""
    windows = [layer.attention.window for layer in spec.layers]
    if len({window for window in windows if window is not None}) > 1:
        return None
    for period in range(1, len(windows) + 2):
        if all((window is not None) == (index % period < period - 1) for index, window in enumerate(windows)):
            return period
    return None


def is_plain_factors(spec: ModelSpec) -> bool:
    """Whether longrope stands for factors that hold for every length, as Llama 3.1's are read from a GGUF file."""
    rope = next((layer.attention.rope for layer in spec.layers if layer.attention.rope is not None), None)
    scaling = rope.scaling if rope is not None else None
    return (
        scaling is not None
        and scaling.kind == "longrope"
        and scaling.short_factor == scaling.long_factor
        and scaling.attention_factor == 1.0
    )


def context_length(spec: ModelSpec, family: GgufFamily) -> int:
    """How many tokens llama.cpp computes as the model does: where it has no windows, those of the smallest."""
    windows = [layer.attention.window for layer in spec.layers if layer.attention.window is not None]
    return spec.max_positions if family.swa_period is not None else min([spec.max_positions, *windows])
