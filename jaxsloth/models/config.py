"""What Hugging Face configs of decoders say, as schemas: fields, their types and bounds; rotary settings in both spellings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import Field

from jaxsloth.foreign import ForeignError, Positive, Schema, Size, Texts, checked, is_number, shown, validated
from jaxsloth.models.spec import ActivationName, Rope, RopeScaling, ScalingKind

# Hugging Face's activation names -> ours. "gelu" is the exact one; the others approximate it by tanh.
ACTIVATIONS: dict[str, ActivationName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_MOST_LAYERS = 4096
_KINDS = ("default", *get_args(ScalingKind), "su")  # su: Phi-3's first name of longrope


class ConfigError(ForeignError):
    """A config that describes no model that can be built: the message names the file, the field and what must hold."""


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


TokenIds = Annotated[
    Any,
    checked("a token id or a list of them", lambda v: all(map(_is_id, v)) if isinstance(v, list | tuple) else _is_id(v)),
]
PadId = Annotated[int, checked("a token id, or -1 for none", lambda v: _is_id(v) or (v == -1 and not isinstance(v, bool)))]
Activation = Annotated[str, checked(f"one of {sorted(ACTIVATIONS)}", lambda v: isinstance(v, str) and v in ACTIVATIONS)]
Layers = Annotated[int, checked(f"an integer from 1 to {_MOST_LAYERS}", lambda v: _is_id(v) and 0 < v <= _MOST_LAYERS)]
Theta = Annotated[float, Field(gt=1, le=1e30)]
Factors = Annotated[
    list[float],
    checked("a list of positive numbers", lambda v: isinstance(v, list | tuple) and all(is_number(x) and x > 0 for x in v)),
]


_SLIDING, _FULL = "sliding_attention", "full_attention"


def _are_layer_types(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(kind in (_SLIDING, _FULL) for kind in value)


class RopeFields(Schema):
    """rope_parameters (transformers 5), or rope_scaling (4 and before)."""

    rope_type: Annotated[str, checked(f"one of {list(_KINDS)}", lambda v: isinstance(v, str) and v in _KINDS)] | None = None
    type: Annotated[str, checked(f"one of {list(_KINDS)}", lambda v: isinstance(v, str) and v in _KINDS)] | None = None
    rope_theta: Theta | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    original_max_position_embeddings: Size | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    mscale: Annotated[float, Field(ge=0)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0)] | None = None
    truncate: bool = True
    short_factor: Factors | None = None
    long_factor: Factors | None = None


# Fields whose null is not their default: no window, no cap, no such token.
_NULL_MEANS_NONE = (
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


class DecoderFields(Schema):
    """The fields of a config that decoders share; a family adds its own and sets other defaults."""

    ROTATES_PARTS: ClassVar[bool] = False  # whether transformers' model looks at partial_rotary_factor

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    hidden_act: Activation
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: Theta | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: Size | None = None
    bos_token_id: TokenIds | None = None
    eos_token_id: TokenIds | None = None
    pad_token_id: PadId | None = None

    @property
    def size_of_head(self) -> int:
        """Channels a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class WindowedFields(DecoderFields):
    """Those of families some of whose layers see no further than a window. layer_types: how each layer attends."""

    sliding_window: Size | None = None
    layer_types: Annotated[list[str], checked(f"a list of {_SLIDING!r} and {_FULL!r}", _are_layer_types)] | None = None
    use_bidirectional_attention: Annotated[bool, checked("false: decoders see what came before", lambda v: v is False)] = False


class NamedFields(Schema):
    """What a config says of the family that it belongs to."""

    architectures: Texts | None = None
    model_type: str | None = None


Fields = TypeVar("Fields", bound=DecoderFields)


def read_fields(config: Mapping[str, Any], where: str | Path, schema: type[Fields]) -> Fields:
    """The fields of a family's schema, checked for themselves and against each other.

    A field that is absent has the schema's default, which is transformers'; null is no default: it is None.

    Raises:
        ConfigError: a field is missing or wrong, or two do not fit each other.
    """
    fields = validated(schema, config, where, ConfigError)
    nulls = [name for name in _NULL_MEANS_NONE if name in schema.model_fields and name in config and config[name] is None]
    fields = fields.model_copy(update=dict.fromkeys(nulls))
    heads, kv_heads, hidden = fields.num_attention_heads, fields.num_key_value_heads, fields.hidden_size
    if kv_heads is not None and heads % kv_heads:
        raise ConfigError(f"{where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
    if fields.head_dim is None and hidden % heads:
        raise ConfigError(f"{where}: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        outside = [i for i in token_ids(getattr(fields, name)) if i >= fields.vocab_size]
        if outside:
            raise ConfigError(f"{where}: {name} must be below vocab_size ({fields.vocab_size}), got {outside[0]}")
    return fields


def windows(fields: WindowedFields, slides: Callable[[int], bool], where: str | Path) -> tuple[int | None, ...]:
    """Each layer's window, or None; slides: whether a layer has one where the config lists no layer_types.

    Raises:
        ConfigError: layer_types has another number of layers, or asks for windows whose size is not given.
    """
    count = fields.num_hidden_layers
    types = fields.layer_types or [_SLIDING if slides(index) else _FULL for index in range(count)]
    if len(types) != count:
        raise ConfigError(f"{where}: layer_types must list num_hidden_layers ({count}) layers, got {len(types)}")
    if _SLIDING in types and fields.sliding_window is None:
        raise ConfigError(f"{where}: sliding_window must be given, as layer_types has {_SLIDING!r} layers")
    return tuple(fields.sliding_window if kind == _SLIDING else None for kind in types)


def token_ids(value: Any) -> tuple[int, ...]:
    """An id, a list of ids, or None."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def only_id(value: Any) -> int | None:
    """The first of the ids, where there is one; -1 is none."""
    found = token_ids(value)
    return found[0] if found and found[0] >= 0 else None


def rope_of(fields: DecoderFields, head_dim: int, where: str | Path, default_theta: float = 10000.0) -> Rope:
    """The rotary settings, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4 and before)."""
    given = dict(fields.rope_scaling or {}) | dict(fields.rope_parameters or {})
    place = f"{where}: {'rope_parameters' if fields.rope_parameters else 'rope_scaling'}"
    return make_rope(fields, given, head_dim, place, fields.rope_theta or default_theta)


def make_rope(fields: DecoderFields, given: dict[str, Any], head_dim: int, place: str, default_theta: float) -> Rope:
    """The rotary settings of `given`; place: where they stand, for errors."""
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(f"{place}.{nested[0]} must be a value, got {shown(given[nested[0]])}: this family has one rope")
    if given and not set(given) & set(RopeFields.model_fields):
        raise ConfigError(f"{place} must hold settings such as rope_type and rope_theta, got {shown(given)}")
    rope = validated(RopeFields, given, place, ConfigError)
    theta = rope.rope_theta or default_theta
    part = rope.partial_rotary_factor or fields.partial_rotary_factor or 1.0
    if part != 1.0 and not fields.ROTATES_PARTS:
        raise ConfigError(f"{place}: partial_rotary_factor must be 1, as this family rotates whole heads, got {part}")
    dim = int(head_dim * part)
    if dim < 2 or dim % 2:
        raise ConfigError(f"{place}: the rotated part of a head must be of an even number of channels, got {dim} of {head_dim}")
    return Rope(theta=theta, rotary_dim=dim, scaling=_scaling(fields, rope, dim, place))


def _scaling(fields: DecoderFields, rope: RopeFields, dim: int, place: str) -> RopeScaling | None:
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return None
    if kind == "su":
        kind = "longrope"
    original = rope.original_max_position_embeddings or fields.original_max_position_embeddings
    factor = rope.factor
    if factor is None and kind in ("yarn", "longrope") and original:
        factor = fields.max_position_embeddings / original
    if factor is None or factor < 1.0:
        raise ConfigError(f"{place}: rope scaling {kind!r} needs a factor of at least 1, got {shown(factor)}")
    _check_kind(kind, rope, dim, place)
    return RopeScaling(
        kind=kind,  # type: ignore[arg-type]
        factor=float(factor),
        original_max_positions=original,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        attention_factor=rope.attention_factor,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
        truncate=rope.truncate,
        short_factor=None if rope.short_factor is None else tuple(rope.short_factor),
        long_factor=None if rope.long_factor is None else tuple(rope.long_factor),
    )


def _check_kind(kind: str, rope: RopeFields, dim: int, place: str) -> None:
    """What a kind of scaling needs beside its factor, as transformers has it."""
    needed = {
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "longrope": ("short_factor", "long_factor"),
    }.get(kind, ())
    missing = [name for name in needed if getattr(rope, name) is None]
    if missing:
        raise ConfigError(f"{place}.{missing[0]} is missing; rope scaling {kind!r} needs it")
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if kind == "llama3" and low is not None and high is not None and low >= high:
        raise ConfigError(f"{place}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
    if kind == "yarn" and (rope.beta_slow or 1.0) >= (rope.beta_fast or 32.0):
        raise ConfigError(f"{place}: beta_slow ({rope.beta_slow}) must be below beta_fast ({rope.beta_fast})")
    if kind == "dynamic" and dim < 4:
        raise ConfigError(f"{place}: rope scaling 'dynamic' needs at least 4 rotated channels a head, got {dim}")
    for name in needed if kind == "longrope" else ():
        count = len(getattr(rope, name))
        if count != dim // 2:
            raise ConfigError(
                f"{place}.{name} must hold {dim // 2} numbers, one a channel pair, got {len(getattr(rope, name))}"
            )
