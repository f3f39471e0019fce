"""PEFT adapter folders: adapter_model.safetensors and adapter_config.json, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from safetensors.numpy import save_file

from jaxsloth.convert.adapter_rules import AdapterConfig, check_values
from jaxsloth.convert.checkpoint import resolve_path
from jaxsloth.convert.files import whole_folder
from jaxsloth.convert.merge import MAGNITUDE, magnitude_shapes
from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsFile
from jaxsloth.foreign import Schema, Size, TextOrTexts, Texts, checked, read_object, shown, validated
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.spec import Lora, ModelSpec

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Features of PEFT's LoRA that change the forward pass or the base and that no backend has: field -> the value that means "off".
_MUST_BE_OFF: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "megatron_config": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
}
# Ways to begin that leave the base as it is. PEFT repeats others (PiSSA, OLoRA, CorDA) when it loads an adapter.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def _are_layers(value: Any) -> bool:
    return all(type(layer) is int and layer >= 0 for layer in (value if isinstance(value, list) else [value]))


class AdapterDocument(Schema):
    """The fields of adapter_config.json that are read here."""

    peft_type: str
    base_model_name_or_path: str | None = None
    r: Size
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: TextOrTexts
    exclude_modules: TextOrTexts = ()
    layers_to_transform: Annotated[Any, checked("a layer's number or a list of them", _are_layers)] = None
    layers_pattern: TextOrTexts = ()
    rank_pattern: dict[str, Size] = Field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(default_factory=dict)
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Texts | None = None

    @model_validator(mode="after")
    def _expressions_are_regular(self) -> AdapterDocument:
        one = [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for text in (*one, *patterns, *self.rank_pattern, *self.alpha_pattern, *(self.modules_to_save or ())):
            try:
                re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{text!r} must be a regular expression, as PEFT takes it: {error}") from error
        return self


def write_adapter(
    folder: Path, spec: ModelSpec, values: Mapping[str, np.ndarray], base_model: str, *, overwrite: bool = False
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads; the folder appears whole or not at all.

    Args:
        values: every name of `trainable_shapes(spec)` -> float32 array.
        base_model: what adapter_config.json calls base_model_name_or_path.

    Raises:
        ExistsError: the folder exists and overwrite is False.
        ValueError: values are not exactly what the spec trains.
    """
    with whole_folder(Path(folder), overwrite=overwrite) as temporary:
        write_adapter_files(temporary, spec, values, base_model)


def write_adapter_files(folder: Path, spec: ModelSpec, values: Mapping[str, np.ndarray], base_model: str) -> None:
    """The two files, into a folder that the caller makes appear whole."""
    check_values(values, trainable_shapes(spec), "the adapter to write")
    if spec.lora is None:
        raise ValueError("the model has no adapter to write")
    save_file(stored(values), folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(peft_config(spec.lora, base_model), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def stored(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An adapter's tensors as its file holds them."""
    return {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}


def peft_config(lora: Lora, base_model: str) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that describe `lora`. Modules are named in full, so that nothing else can match."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.modules),
        "use_rslora": lora.rslora,
        "bias": lora.bias,
        "modules_to_save": [name.rpartition(".")[2] for name in lora.modules_to_save] or None,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def read_config(folder: Path, *, dora: bool = False) -> AdapterConfig:
    """Reads adapter_config.json.

    Args:
        dora: DoRA's magnitudes are welcome, as where an adapter is merged.

    Raises:
        CheckpointError: the file is missing or not a LoRA's; a feature is used that no backend has (named).
    """
    file, config = Path(folder) / CONFIG, _read_object(folder)
    for name, off in _MUST_BE_OFF.items():
        if config.get(name) not in (off, None) and not (dora and name == "use_dora"):
            raise CheckpointError(f"{file}: {name} must be {shown(off)}, got {shown(config[name])}: it is not supported")
    begun = config.get("init_lora_weights", True)
    if begun not in _PLAIN_BEGINNINGS:
        raise CheckpointError(
            f"{file}: init_lora_weights={shown(begun)} changed the base that the adapter belongs to; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    fields = _document(config, file)
    targets, layers = fields.target_modules, fields.layers_to_transform
    return AdapterConfig(
        base_model=fields.base_model_name_or_path,
        r=fields.r,
        alpha=float(fields.lora_alpha),
        dropout=float(fields.lora_dropout),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=fields.use_rslora,
        bias=fields.bias,
        modules_to_save=tuple(fields.modules_to_save or ()),
        exclude=_several(fields.exclude_modules),
        layers=tuple(layers) if isinstance(layers, list) else layers,
        layers_pattern=_several(fields.layers_pattern),
        rank_pattern=fields.rank_pattern,
        alpha_pattern=fields.alpha_pattern,
    )


def _several(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)


def find_adapter(name: str | Path, **hub: Any) -> Path | None:
    """The folder of the PEFT adapter that a path or a Hugging Face name leads to; None where it leads to something else."""
    folder = resolve_path(str(name), **hub)
    return folder if (folder / CONFIG).is_file() else None


def base_model_of(folder: Path) -> str:
    """The base that a LoRA adapter's folder names; its other fields are looked at too, whatever features they ask for.

    Raises:
        CheckpointError: adapter_config.json is missing, wrong, or names no base.
    """
    file = Path(folder) / CONFIG
    base = _document(_read_object(folder), file).base_model_name_or_path
    if not base:
        raise CheckpointError(
            f"{file}: base_model_name_or_path must name the base model, got {shown(base)}; give the base itself"
        )
    return base


def _read_object(folder: Path) -> dict[str, Any]:
    file = Path(folder) / CONFIG
    if not file.exists():
        raise CheckpointError(f"{folder} is not a PEFT adapter: it has no {CONFIG}")
    config = read_object(file, CheckpointError)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type must be 'LORA', got {shown(config.get('peft_type'))}")
    return config


def _document(config: dict[str, Any], file: Path) -> AdapterDocument:
    fields = validated(AdapterDocument, config, file, CheckpointError)
    if not fields.target_modules:
        raise CheckpointError(f"{file}: target_modules must name modules, got {shown(fields.target_modules)}")
    return fields


def read_adapter(folder: Path, *, dora: bool = False) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """(its config, its tensors by PEFT name, float32). Whether they fit a model is the question of `AdapterConfig.fitted`.
    dora: as in `read_config`."""
    config, file = read_config(folder, dora=dora), Path(folder) / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a whole PEFT adapter: it has no {WEIGHTS}")
    source = SafetensorsFile(file)
    return config, {name: np.array(source.read(name), np.float32) for name in source.names()}


def fitted_adapter(folder: Path, spec: ModelSpec) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """A folder's adapter on a model: (its spec with the adapters, their values), as `Model.add_adapters` takes them.

    Raises:
        CheckpointError: it can't be read, or is not one of this model.
    """
    config, values = read_adapter(folder)
    return config.fitted(spec, values, str(folder))


def merging_adapter(folder: Path, spec: ModelSpec) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """`fitted_adapter` of one that is merged: with DoRA's magnitudes among its values, `magnitude_name` -> ``[out]``."""
    config, values = read_adapter(folder, dora=True)
    found = {name: values.pop(name) for name in list(values) if name.endswith(MAGNITUDE)}
    adapted, values = config.fitted(spec, values, str(folder))
    if not found and not _read_object(folder).get("use_dora"):
        return adapted, values
    shapes = magnitude_shapes(adapted)
    check_values(found, shapes, str(folder))
    return adapted, values | found
