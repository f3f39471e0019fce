"""ModelSpec: everything that a forward pass needs to know of a model, as frozen data.

No arrays and no framework. Both backends build their model from it, and `jaxsloth.transforms` turns one spec into
another (adapters added, base quantized). Sizes are counts of elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

ScalingKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length. Fields that a kind does not use stay None."""

    kind: ScalingKind
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] | None = None  # longrope
    long_factor: tuple[float, ...] | None = None  # longrope


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. rotary_dim < head_dim rotates the first channels only (Phi-3's partial rotary factor)."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Norm:
    """weight_offset is added to the weight (Gemma: 1.0). kind "layer" subtracts the mean and may have a bias."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    weight_offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class Attention:
    """scale multiplies q·k. window: keys at distance < window are seen (each way when not causal)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    causal: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    window: int | None = None
    soft_cap: float | None = None
    fused_qkv: bool = False


@dataclass(frozen=True)
class Mlp:
    """gated: ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``. fused: gate and up are one stored weight."""

    width: int
    activation: ActivationName
    gated: bool = True
    bias: bool = False
    fused: bool = False


BodyT = TypeVar("BodyT")


@dataclass(frozen=True)
class Branch:
    """One sublayer on the residual stream: ``x + scale·post_norm(body(norm(x)))``.

    Where position is "post" (BERT) it is ``norm(x + scale·body(x))``. A norm that is None is the identity. Names are those
    under which a block's parts lie in a checkpoint: "self_attn", "input_layernorm".
    """

    name: str
    body: Attention | Mlp
    norm: Norm | None = None
    norm_name: str = ""
    post_norm: Norm | None = None
    post_norm_name: str = ""
    position: Literal["pre", "post"] = "pre"
    scale: float = 1.0

    @property
    def norms(self) -> dict[str, Norm]:
        """The branch's own norms by name, in the order in which the forward pass meets them."""
        both = ((self.norm_name, self.norm), (self.post_norm_name, self.post_norm))
        return {name: norm for name, norm in both if norm is not None}


@dataclass(frozen=True)
class Block:
    """One layer of the model: its branches, one after the other."""

    branches: tuple[Branch, ...]

    @classmethod
    def pre_norm(cls, attention: Attention, mlp: Mlp, norm: Norm | None, mlp_norm: Norm | None = None) -> Block:
        """Llama's: a norm before each of the two. mlp_norm None: the same as before attention."""
        return cls(
            (
                Branch("self_attn", attention, norm, "input_layernorm"),
                Branch("mlp", mlp, norm if mlp_norm is None else mlp_norm, "post_attention_layernorm"),
            )
        )

    @classmethod
    def sandwich(cls, attention: Attention, mlp: Mlp, norm: Norm) -> Block:
        """Gemma 2's and 3's: a norm before and one behind each of the two."""
        return cls(
            (
                Branch("self_attn", attention, norm, "input_layernorm", norm, "post_attention_layernorm"),
                Branch("mlp", mlp, norm, "pre_feedforward_layernorm", norm, "post_feedforward_layernorm"),
            )
        )

    def with_bodies(self, **bodies: Attention | Mlp) -> Block:
        """The same block with other bodies, by their branches' names."""
        return Block(tuple(replace(branch, body=bodies.get(branch.name, branch.body)) for branch in self.branches))

    @property
    def attention(self) -> Attention:
        return self._body(Attention)

    @property
    def mlp(self) -> Mlp:
        return self._body(Mlp)

    def _body(self, kind: type[BodyT]) -> BodyT:
        return next(branch.body for branch in self.branches if isinstance(branch.body, kind))


@dataclass(frozen=True)
class Embedding:
    """Token embedding times scale, plus learned positions and token types (BERT), then a norm (BERT, ModernBERT).

    scale is rounded to the compute dtype before use, as transformers does for Gemma. padding_id's row is zero at init only.
    """

    vocab: int
    scale: float = 1.0
    learned_positions: int = 0
    token_types: int = 0
    norm: Norm | None = None


@dataclass(frozen=True)
class Head:
    """A language-model head (tied: the embedding's weight) or a classifier over a pooled state.

    transform: the activation of a dense+norm stage before the decoder (BERT's and ModernBERT's MLM heads), or None.
    """

    kind: Literal["lm", "classification"] = "lm"
    tied: bool = False
    bias: bool = False
    soft_cap: float | None = None
    labels: int = 0
    pooling: Literal["cls", "mean", "last"] | None = None
    transform: ActivationName | None = None


@dataclass(frozen=True)
class Lora:
    """Adapters on named linear layers. scale is alpha / r, or alpha / sqrt(r) with rslora."""

    r: int
    alpha: float
    scale: float
    dropout: float
    modules: tuple[str, ...]  # Hugging Face names, in the model's order
    modules_to_save: tuple[str, ...] = ()  # trained whole, in float32
    bias: Literal["none", "all", "lora_only"] = "none"
    rslora: bool = False


@dataclass(frozen=True)
class Quantization:
    """The frozen linear layers named in modules are stored as NF4; nested: their absmax is quantized too."""

    nested: bool
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model: its weight is ``[out_features, in_features]``, as in the checkpoint."""

    name: str
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. max_positions is the trained context; token ids are the checkpoint's."""

    family: str
    hidden: int
    layers: tuple[Block, ...]
    embedding: Embedding
    norm: Norm | None  # after the last layer
    head: Head
    max_positions: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    lora: Lora | None = None
    quantization: Quantization | None = None

    def layer_period(self) -> int:
        """The shortest run of layers that repeats through the model: 1 when all are alike (2, 6 where windows alternate), and
        stored alike.

        Equal to the number of layers when nothing repeats. JAX stacks and scans the layers by this period.
        """
        count, stored = len(self.layers), self._quantized_parts()
        kinds = [(layer, stored.get(index)) for index, layer in enumerate(self.layers)]
        for period in range(1, count):
            if count % period == 0 and all(kinds[i] == kinds[i % period] for i in range(count)):
                return period
        return count

    def _quantized_parts(self) -> dict[int, set[str]]:
        """Which linear layers are NF4, by block."""
        found: dict[int, set[str]] = {}
        for module in self.quantization.modules if self.quantization is not None else ():
            _, _, index, part = module.split(".", 3)
            found.setdefault(int(index), set()).add(part)
        return found
