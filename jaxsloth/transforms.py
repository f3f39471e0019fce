"""Spec -> spec: where adapters go and what is quantized, decided before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from jaxsloth.foreign import ForeignError, check_expression
from jaxsloth.models.names import EMBEDDING, LM_HEAD, linears
from jaxsloth.models.spec import Lora, ModelSpec, Quantization

ALL_LINEAR = "all-linear"
SAVEABLE = (EMBEDDING, LM_HEAD)


def match_modules(spec: ModelSpec, targets: str | Sequence[str]) -> tuple[str, ...]:
    """The linear layers that `targets` names, as PEFT matches them.

    "all-linear" is every linear layer but the head; another string is a regular expression that must match the whole name;
    a list holds names or their last parts (``q_proj``).

    Raises:
        ValueError: a target (or the expression) matches no layer; the message lists what can be named.
    """
    names = [linear.name for linear in linears(spec)]
    kinds = sorted({name.rpartition(".")[2] for name in names})
    if targets == ALL_LINEAR:
        return tuple(names)
    if isinstance(targets, str):
        check_expression(targets, names, "lora.targets")
        found = [name for name in names if re.fullmatch(targets, name)]
        if not found:
            raise ValueError(f"lora.targets: the expression {targets!r} matches no linear layer; the layers end in {kinds}")
        return tuple(found)
    if not targets:
        raise ForeignError(f"lora.targets must name at least one layer, got an empty list; the layers end in {kinds}")
    for target in targets:
        if not any(_ends_with(name, target) for name in names):
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; the layers end in {kinds}, or {ALL_LINEAR!r}")
    return tuple(name for name in names if any(_ends_with(name, target) for target in targets))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def saved_modules(spec: ModelSpec, modules: Sequence[str]) -> tuple[str, ...]:
    """The full names of modules that are to be trained whole, in a fixed order.

    Raises:
        ValueError: one is unknown, or a tied head would be trained apart.
    """
    saved = set()
    for module in modules:
        full = next((name for name in SAVEABLE if _ends_with(name, module)), None)
        if full is None:
            raise ValueError(f"lora.modules_to_save: {module!r} can't be trained whole; allowed: {list(SAVEABLE)}")
        if spec.head.tied:
            raise ValueError(
                f"lora.modules_to_save: {module!r} is tied (embedding and head share one weight) and training one alone would "
                "untie them; target linear layers instead"
            )
        saved.add(full)
    return tuple(name for name in SAVEABLE if name in saved)


def add_lora(
    spec: ModelSpec,
    *,
    r: int,
    alpha: float,
    targets: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    rslora: bool = False,
    bias: Literal["none", "all", "lora_only"] = "none",
    modules_to_save: Sequence[str] = (),
) -> ModelSpec:
    """The same model with LoRA adapters (Hu et al. 2021) of rank r on the layers that `targets` names.

    Raises:
        ValueError: a target matches nothing, a module to save is unknown, or a tied head would be trained apart.
    """
    lora = Lora(
        r=r,
        alpha=alpha,
        scale=alpha / (math.sqrt(r) if rslora else r),
        dropout=dropout,
        modules=match_modules(spec, targets),
        modules_to_save=saved_modules(spec, modules_to_save),
        bias=bias,
        rslora=rslora,
    )
    return replace(spec, lora=lora)


def quantize(spec: ModelSpec, *, nested: bool) -> ModelSpec:
    """The same model with every linear layer of its blocks stored as NF4; embedding, norms and head stay as they are, and so
    does a model that is quantized already."""
    if spec.quantization is not None:
        return spec
    return replace(spec, quantization=Quantization(nested=nested, modules=tuple(linear.name for linear in linears(spec))))
