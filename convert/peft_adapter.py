"""PEFT adapter folders: adapter_model.safetensors and adapter_config.json, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from safetensors.numpy import save_file

from jaxsloth.convert.files import whole_folder
from jaxsloth.convert.safetensors_source import CheckpointError, SafetensorsFile
from jaxsloth.foreign import Schema, Size, TextOrTexts, Texts, read_object, shown, validated
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.spec import Lora, ModelSpec
from jaxsloth.transforms import add_lora

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Features of PEFT's LoRA that change the forward pass and that no backend has: field -> the value that means "off".
_MUST_BE_OFF: dict[str, Any] = {
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "fan_in_fan_out": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "megatron_config": None,
    "target_parameters": None,
}


class AdapterDocument(Schema):
    """The fields of adapter_config.json that are read here."""

    peft_type: str
    base_model_name_or_path: str | None = None
    r: Size
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: TextOrTexts
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Texts | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says: where the base is, and the adapters' shape. targets is PEFT's target_modules."""

    base_model: str | None
    r: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]
    rslora: bool
    bias: str
    modules_to_save: tuple[str, ...]

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The spec with these adapters; ValueError where they do not fit the model."""
        return add_lora(
            spec,
            r=self.r,
            alpha=self.alpha,
            targets=self.targets,
            dropout=self.dropout,
            rslora=self.rslora,
            bias=self.bias,  # type: ignore[arg-type]
            modules_to_save=self.modules_to_save,
        )


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
    arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}
    save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(peft_config(spec.lora, base_model), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


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


def read_config(folder: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Raises:
        CheckpointError: the file is missing or not a LoRA's; a feature is used that no backend has (named).
    """
    file, config = Path(folder) / CONFIG, _read_object(folder)
    for name, off in _MUST_BE_OFF.items():
        if config.get(name) not in (off, None):
            raise CheckpointError(f"{file}: {name} must be {shown(off)}, got {shown(config[name])}: it is not supported")
    fields = _document(config, file)
    targets = fields.target_modules
    return AdapterConfig(
        base_model=fields.base_model_name_or_path,
        r=fields.r,
        alpha=float(fields.lora_alpha),
        dropout=float(fields.lora_dropout),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=fields.use_rslora,
        bias=fields.bias,
        modules_to_save=tuple(fields.modules_to_save or ()),
    )


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


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """(its config, its tensors by PEFT name, float32). Whether they fit a model is `check_values`' question."""
    config, file = read_config(folder), Path(folder) / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a whole PEFT adapter: it has no {WEIGHTS}")
    source = SafetensorsFile(file)
    return config, {name: np.array(source.read(name), np.float32) for name in source.names()}


def check_values(values: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """That `values` holds exactly the expected names and shapes; ValueError names the first that is missing or off."""
    missing = [name for name in expected if name not in values]
    unknown = [name for name in values if name not in expected]
    if missing or unknown:
        parts = [f"lacks {missing[0]} ({len(missing)} missing)"] if missing else []
        parts += [f"has {unknown[0]}, which the model does not train ({len(unknown)} such)"] if unknown else []
        raise ValueError(f"{what} {' and '.join(parts)}")
    for name, shape in expected.items():
        if values[name].shape != shape:
            raise ValueError(f"{what}: {name} must have the shape {shape}, and it has {values[name].shape}")
