"""Which layers a PEFT adapter covers and how, by PEFT's own rules; and its tensors as one shape, which a spec's Lora has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import check_expression
from jaxsloth.models.names import linears, lora_names, saved_name, trainable_shapes
from jaxsloth.models.spec import Lora, ModelSpec
from jaxsloth.transforms import ALL_LINEAR, SAVEABLE, saved_modules

_SHOWN = 20


# How PEFT wraps what a config says before it matches names with it.
_SAVED, _LAYERS, _KEY = r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(\d+)\.", r"(.*\.)?({})$"


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says: where the base is, which modules have adapters, and the adapters' shape.

    The fields are `peft.LoraConfig`'s, some under shorter names: alpha (lora_alpha), dropout, targets (target_modules), exclude
    (exclude_modules), layers (layers_to_transform), rslora.
    """

    base_model: str | None
    r: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]
    rslora: bool
    bias: str
    modules_to_save: tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None

    def covers(self, module: str) -> bool:
        """Whether PEFT puts an adapter on the linear layer of that full name."""
        if isinstance(self.exclude, str) and self.exclude:
            if re.fullmatch(self.exclude, module):
                return False
        elif _named(module, self.exclude):
            return False
        if any(re.match(_SAVED.format(saved), module) for saved in self.modules_to_save):
            return False
        if isinstance(self.targets, str):
            return self.targets.lower() == ALL_LINEAR or re.fullmatch(self.targets, module) is not None
        return module in self.targets or (_named(module, self.targets) and self._in_layers(module))

    def _check_expressions(self, names: Sequence[str], what: str) -> None:
        """That every expression comes to an end, as it is matched below."""
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        used = (
            ("target_modules", [self.targets] if isinstance(self.targets, str) else [], "{}"),
            ("exclude_modules", [self.exclude] if isinstance(self.exclude, str) else [], "{}"),
            ("modules_to_save", self.modules_to_save, _SAVED),
            ("layers_pattern", patterns, _LAYERS),
            ("rank_pattern", self.rank_pattern or (), _KEY),
            ("alpha_pattern", self.alpha_pattern or (), _KEY),
        )
        for field, expressions, around in used:
            for expression in expressions:
                check_expression(expression, names, f"{what}: {field}", CheckpointError, around)

    def _in_layers(self, module: str) -> bool:
        """layers_to_transform, which PEFT heeds where target_modules names the ends of names."""
        if self.layers is None or self.layers == ():
            return True
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [_LAYERS.format(pattern) for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        match = next((found for text in expressions if (found := re.match(text, module))), None)
        return match is not None and int(match[1]) in ((self.layers,) if isinstance(self.layers, int) else self.layers)

    def rank(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def fitted(self, spec: ModelSpec, values: Mapping[str, np.ndarray], what: str) -> tuple[ModelSpec, dict[str, np.ndarray]]:
        """The spec with these adapters, and their values as it wants them: of the largest rank, the others filled up with
        zeros, and of one scaling, the others' in their B.

        Args:
            values: the adapter's tensors by PEFT's names, float32.
            what: how errors call the adapter, its folder.

        Raises:
            CheckpointError: the tensors are not those that the config says an adapter of this model has, or not finite.
        """
        self._check_expressions([linear.name for linear in linears(spec)], what)
        modules = tuple(linear.name for linear in linears(spec) if self.covers(linear.name))
        if not modules:
            raise CheckpointError(f"{what}: target_modules must match a linear layer of the model, got {_shown(self.targets)}")
        ranks, scales = {name: self.rank(name) for name in modules}, {name: self.scale(name) for name in modules}
        uniform = len(set(ranks.values())) == 1 == len(set(scales.values()))
        r = max(ranks.values())
        scale = scales[modules[0]]
        alpha = self.alpha if uniform and r == self.r else scale * (math.sqrt(r) if self.rslora else r)
        bias = cast(Literal["none", "all", "lora_only"], self.bias)
        lora = Lora(r, alpha, scale, self.dropout, modules, saved_modules(spec, self._saved(values)), bias, self.rslora)
        adapted = replace(spec, lora=lora)
        expected = trainable_shapes(adapted)
        for module in modules:
            a, b = lora_names(module)
            expected[a], expected[b] = (ranks[module], expected[a][1]), (expected[b][0], ranks[module])
        check_values(values, expected, what)
        if uniform:
            return adapted, dict(values)
        found = dict(values)
        for module in modules:
            a, b = lora_names(module)
            found[a], found[b] = at_rank(values[a], values[b], r, scales[module] / scale)
        return adapted, found

    def _saved(self, values: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """What stands whole in the base's place: modules_to_save, and what PEFT stores besides (save_embedding_layers)."""
        stored = [name for name in SAVEABLE if saved_name(f"{name}.weight") in values]
        return (*self.modules_to_save, *(name for name in stored if not _named(name, self.modules_to_save)))


def _named(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that the module's name ends in, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(_KEY.format(pattern), module):
            return value
    return otherwise


def at_rank(a: np.ndarray, b: np.ndarray, r: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """The same adapter with zeros up to rank r, and B times factor."""
    missing = r - len(a)
    a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
    return a, b if factor == 1.0 else (b * np.float32(factor)).astype(np.float32)


def check_values(values: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """That `values` holds exactly the expected names and shapes, all finite; the error names those that do not fit."""
    missing = [name for name in expected if name not in values]
    unknown = [name for name in values if name not in expected]
    if missing or unknown:
        parts = [f"lacks {_shown(missing)} ({len(missing)} missing)"] if missing else []
        parts += [f"has {_shown(unknown)}, which the model does not train ({len(unknown)} such)"] if unknown else []
        raise CheckpointError(f"{what} {' and '.join(parts)}")
    for name, shape in expected.items():
        if values[name].shape != shape:
            raise CheckpointError(f"{what}: {name} must have the shape {shape}, got {values[name].shape}")
        if not np.isfinite(values[name]).all():
            wrong = values[name][~np.isfinite(values[name])]
            raise CheckpointError(f"{what}: {name} must hold finite values, got {wrong.size} others, the first {wrong[0]}")


def _shown(names: str | Sequence[str]) -> str:
    if isinstance(names, str):
        return repr(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
