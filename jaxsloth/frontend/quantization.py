"""``quantization_config=`` of from_pretrained: transformers' BitsAndBytesConfig as this project's NF4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxsloth.frontend.arguments import warn_where_set

_NAME = "BitsAndBytesConfig"
_COMPUTE = "bnb_4bit_compute_dtype"
_WITHOUT_HEAD = ([], ["lm_head"])  # the head is never quantized
# transformers' fields and their defaults.
_DEFAULTS: dict[str, Any] = {
    "load_in_4bit": False,
    "load_in_8bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    _COMPUTE: "float32",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8",
    "quant_method": "bitsandbytes",
}
_UNUSED = {
    "llm_int8_threshold": (6.0, "it belongs to load_in_8bit"),
    "bnb_4bit_quant_storage": ("uint8", "the backend chooses how 4-bit weights are stored"),
}


@dataclass(frozen=True)
class Asked:
    """What a BitsAndBytesConfig asks for. dtype: None where it leaves that to ``dtype=``."""

    load_in_4bit: bool
    nested: bool
    dtype: Any


def read_bitsandbytes(config: Any, dtype: Any) -> Asked:
    """transformers' BitsAndBytesConfig, or its fields as a mapping; what it says counts, whatever load_in_4bit= is.

    Args:
        dtype: from_pretrained's. There is one dtype here, that of products; bnb_4bit_compute_dtype is it, where dtype is None
            or "auto". float32, which is its default, leaves the choice to dtype.

    Raises:
        TypeError: another quantization's config.
        ValueError: a field is unknown, or asks for what is not here; the message says what to write.
    """
    fields = dict(config) if isinstance(config, Mapping) else _fields(config)
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    unknown = sorted(set(fields) - set(_DEFAULTS))
    if unknown:
        raise ValueError(f"quantization_config has no field {unknown[0]!r}; {_NAME} has: {', '.join(_DEFAULTS)}")
    fields = {name: _named(value) for name, value in fields.items()}
    asked = _DEFAULTS | {name: value for name, value in fields.items() if value is not None}
    _refuse(asked)
    warn_where_set(_NAME, asked, _UNUSED)
    if not asked["load_in_4bit"]:
        return Asked(False, False, dtype)
    compute, wanted = asked[_COMPUTE], None if dtype is None else _named(dtype)
    if compute == "float32" or wanted == compute:
        return Asked(True, bool(asked["bnb_4bit_use_double_quant"]), dtype)
    if wanted not in (None, "auto"):
        raise ValueError(
            f"{_NAME}: {_COMPUTE} must be dtype=, as layers and products have one dtype here, got {compute} and {wanted}; "
            "leave one of them out"
        )
    return Asked(True, bool(asked["bnb_4bit_use_double_quant"]), compute)


def _fields(config: Any) -> dict[str, Any]:
    if type(config).__name__ != _NAME:
        raise TypeError(
            f"quantization_config must be a {_NAME} (or its fields as a dict), got {type(config).__name__}: other "
            "quantizations are not here; give load_in_4bit=True"
        )
    return dict(config.to_dict())


def _refuse(asked: Mapping[str, Any]) -> None:
    """ValueError for what is not here, with what to write."""
    if _named(getattr(asked["quant_method"], "value", asked["quant_method"])) != "bitsandbytes":
        raise ValueError(
            f"quantization_config: quant_method {asked['quant_method']} is not here; a base has 16 or 32 bits, or is NF4"
        )
    reasons = {
        "load_in_8bit": (asked["load_in_8bit"], "there are no 8-bit bases; write load_in_4bit=True"),
        "bnb_4bit_quant_type": (
            asked["load_in_4bit"] and asked["bnb_4bit_quant_type"] != "nf4",
            "4-bit bases are NF4 here; write bnb_4bit_quant_type='nf4' (bitsandbytes takes fp4 where it is left out)",
        ),
        "llm_int8_skip_modules": (
            asked["llm_int8_skip_modules"] not in (None, *_WITHOUT_HEAD),
            "every linear layer of the blocks is quantized, or none; leave it out (the head stays as it is), or load a "
            "checkpoint that was saved so",
        ),
        "llm_int8_enable_fp32_cpu_offload": (asked["llm_int8_enable_fp32_cpu_offload"], "no layer is left on the host"),
        "llm_int8_has_fp16_weight": (asked["llm_int8_has_fp16_weight"], "there are no 8-bit bases"),
    }
    for name, (is_wrong, reason) in reasons.items():
        if is_wrong:
            raise ValueError(f"{_NAME} can't have {name}={asked[name]!r}: {reason}")


def _named(value: Any) -> Any:
    """A dtype by its name; anything else as it is."""
    text = value if isinstance(value, str) else str(value)
    return text.removeprefix("torch.") if isinstance(value, str) or text.startswith("torch.") else value
