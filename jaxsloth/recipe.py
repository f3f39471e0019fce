"""The recipe: everything that decides a run's numbers, in one validated object; YAML in and out.

The same file with ``backend: torch`` or ``backend: jax`` gives the same numbers. Wrong values fail here, naming the field,
what came and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from jaxsloth import foreign
from jaxsloth.foreign import ForeignError, explain, read_text, shown
from jaxsloth.models.spec import ModelSpec
from jaxsloth.transforms import ALL_LINEAR, add_lora, quantize

# Numbers are bounded, so that a slip of the keyboard is an error here and not an overflow, or a machine without memory. They
# are strict: no string and no boolean is taken for one.
Positive = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
NonNegative = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Rows = Annotated[int, Field(gt=0, le=2**16, strict=True)]
Length = Annotated[int, Field(gt=0, le=2**24, strict=True)]
Multiple = Annotated[int, Field(gt=0, le=2**16, strict=True)]
Rank = Annotated[int, Field(gt=0, le=2**16, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Texts = Annotated[tuple[str, ...], Field(max_length=2**16)]
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class RecipeError(ForeignError):
    """A recipe that can't be used; the message lists every wrong field."""


class Section(BaseModel):
    """Part of a recipe: immutable, and unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraRecipe(Section):
    """Adapters (Hu et al. 2021). The scale is alpha / r, or alpha / sqrt(r) with rslora (Kalajdzievski 2023)."""

    r: Rank = 16
    alpha: Annotated[float, Field(gt=0, le=1e6, strict=True)] = 16.0
    dropout: Fraction = 0.0
    targets: str | Texts = Field(default=ALL_LINEAR, description="'all-linear', a regular expression, or a list of names")
    rslora: Switch = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init: Literal["kaiming", "gaussian"] = Field(default="kaiming", description="A's distribution; B starts at zero")
    modules_to_save: Texts = ()
    adapter: str | None = Field(
        default=None, description="a PEFT folder, or a GGUF adapter, to begin from: it says all of the above but dropout"
    )

    @model_validator(mode="after")
    def _adapter_decides(self) -> LoraRecipe:
        fields = {name: field for name, field in type(self).model_fields.items() if name not in ("adapter", "dropout")}
        other = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if self.adapter is not None and other:
            raise ValueError(f"adapter says its {', '.join(other)} itself; leave {'them' if len(other) > 1 else 'it'} out")
        return self


class DataRecipe(Section):
    """Rows and how they become tokens.

    path: a JSON, JSONL, CSV or Parquet file, ``package:NAME/file``, or a Hugging Face dataset name. columns renames the file's
    fields to those that the format expects, e.g. ``{prompt: question, completion: answer}``.
    """

    path: str
    split: str = "train"
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "text"] = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="expected field -> the file's field")
    template: str | None = Field(
        default=None, description="a name (chatml, llama-3.1, qwen-3 …), a Jinja template, or null for the tokenizer's own"
    )
    system: str | None = Field(default=None, description="a system message put before every conversation that has none")
    response_only: Switch = Field(default=True, description="only the answers are learnt, not the prompts")
    packing: Switch = False
    max_length: Length = 1024
    truncation: Switch = Field(default=False, description="cut longer rows at the end; off: a longer row is an error")
    pad_to_multiple_of: Multiple = Field(
        default=64, description="batch lengths are rounded up to this, so that few shapes compile"
    )
    limit: Positive | None = Field(default=None, description="use the first rows only")
    shuffle: Switch = True
    validation_path: str | None = None
    validation_fraction: Fraction = Field(default=0.0, description="share of the rows held out, chosen by the seed")


class OptimizerRecipe(Section):
    """AdamW: decoupled decay, bias-corrected, eps outside the root."""

    name: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit keeps its moments in 8 bits, as bitsandbytes' AdamW8bit does"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1e3, strict=True)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0, le=1e3, strict=True)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1, strict=True)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0, le=1e30, strict=True)] | None = 1.0


class ScheduleRecipe(Section):
    """Warm-up from zero, then the shape of `kind` down to zero (constant: stays). warmup_ratio is of all steps, rounded up."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: NonNegative = 0
    warmup_ratio: Fraction = 0.0

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleRecipe:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class EvaluationRecipe(Section):
    """every: optimizer steps between evaluations on the held-out rows; null: only at the end."""

    every: Positive | None = None
    batch_size: Rows = 8


class CheckpointRecipe(Section):
    """every: optimizer steps between checkpoints; null: only at the end. best: keep the lowest held-out loss too."""

    output: str = "outputs/run"
    every: Positive | None = None
    keep: Positive = Field(default=2, description="how many of the newest checkpoints stay")
    best: Switch = False


class Recipe(Section):
    """A whole run. batch_size is rows a micro-batch over all devices; a step takes batch_size × accumulation rows."""

    model: str = Field(description="a folder, a .gguf file, package:NAME/file, or a Hugging Face name")
    data: DataRecipe
    backend: Literal["auto", "torch", "jax"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, else float32"
    )
    quantization: Literal["none", "nf4", "nf4-nested"] = "none"
    gradient_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = "none"
    compute: Literal["exact", "fp8"] = Field(
        "exact",
        description="fp8: products with frozen weights in 8 bits while training (torch, bfloat16, a GPU of 8.9 or later)",
    )
    lora: LoraRecipe = LoraRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=1e6, strict=True)] | None = None
    batch_size: Rows = 2
    accumulation: Rows = 1
    evaluation: EvaluationRecipe = EvaluationRecipe()
    checkpoints: CheckpointRecipe = CheckpointRecipe()
    log_every: Positive = 1
    seed: Seed = 0
    implementations: dict[str, str] = Field(default_factory=dict, description="op -> implementation asked for by name")

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_alias(cls, value: Any) -> Any:
        return _DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.compute == "fp8" and self.backend == "jax":
            raise ValueError("compute: fp8 runs on the torch backend so far; set backend: torch, or compute: exact")
        if self.compute == "fp8" and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(f"compute: fp8 needs dtype bfloat16, got {self.dtype}; set dtype: bfloat16, or compute: exact")
        held_out = self.data.validation_path is not None or self.data.validation_fraction > 0
        if self.checkpoints.best and not held_out:
            raise ValueError("checkpoints.best needs held-out rows: set data.validation_fraction or data.validation_path")
        if self.evaluation.every is not None and not held_out:
            raise ValueError("evaluation.every needs held-out rows: set data.validation_fraction or data.validation_path")
        if self.data.validation_path is not None and self.data.validation_fraction > 0:
            raise ValueError("give data.validation_path or data.validation_fraction, not both")
        return self

    def quantized(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the recipe's base."""
        return spec if self.quantization == "none" else quantize(spec, nested=self.quantization == "nf4-nested")

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the model that a recipe without lora.adapter trains: quantized and with its adapters."""
        spec, lora = self.quantized(spec), self.lora
        return add_lora(
            spec,
            r=lora.r,
            alpha=lora.alpha,
            targets=lora.targets,
            dropout=lora.dropout,
            rslora=lora.rslora,
            bias=lora.bias,
            modules_to_save=lora.modules_to_save,
        )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def differences(self, other: Recipe) -> list[str]:
        """The fields in which two recipes differ, as ``field: this -> other``; those that can't change numbers are left out."""
        mine, theirs = _flatten(self.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
        keys = sorted(k for k in {*mine, *theirs} if not any(k == f or k.startswith(f"{f}.") for f in _FREE_FIELDS))
        return [f"{key}: {mine.get(key)!r} -> {theirs.get(key)!r}" for key in keys if mine.get(key) != theirs.get(key)]


# What a resumed run may change: none of these decides a loss (parity between backends is what the project promises).
_FREE_FIELDS = ("backend", "log_every", "checkpoints", "evaluation", "implementations", "gradient_checkpointing")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; recipes are full of them."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).append(
        ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"))
    )


def parse_yaml(text: str, where: str | Path = "the text") -> Any:
    """YAML with 1e-3 read as a number; where: its file, for errors."""
    return foreign.parse_yaml(text, where, RecipeError, _Loader)  # a SafeLoader: builds plain data only


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies ``key=value`` overrides (dotted keys, values in YAML: ``optimizer.learning_rate=1e-3``).

    Raises:
        RecipeError: the file is missing, is no mapping, or a field is wrong; every wrong field is listed.
    """
    file = foreign.local_path(path, "the recipe", RecipeError)
    if not foreign.present(file):
        raise RecipeError(f"no recipe file at {file}")
    values = parse_yaml(read_text(file, RecipeError, foreign.MEBIBYTE), file)
    if not isinstance(values, dict):
        raise RecipeError(f"{file} must hold a mapping of recipe fields, got {shown(values)}")
    for override in overrides:
        _apply_override(values, override)
    return make_recipe(values, origin=str(file))


def make_recipe(values: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """A Recipe from plain data; `RecipeError` lists every wrong field."""
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        raise RecipeError(f"{origin} is not a valid recipe:\n  " + "\n  ".join(lines)) from error


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override must look like key=value, got {override!r}")
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        child = target.get(parent)
        if child is None:
            child = target[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {parent!r} is a value, not a section")
        target = child
    target[last] = parse_yaml(text, f"the override {override!r}")


def _explain(detail: ErrorDetails) -> str:
    field = ".".join(str(part) for part in detail["loc"]) or "recipe"
    if detail["type"] == "extra_forbidden":
        names = _fields_at(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(names)}"
        return f"{field}: unknown key; {hint}"
    return explain(detail, field)


def _fields_at(location: Sequence[int | str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return list(section.model_fields)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
