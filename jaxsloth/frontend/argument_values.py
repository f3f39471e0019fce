"""What arguments of the Python calls may be: checked like a foreign document, before anything is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Annotated, Any

import numpy as np

from jaxsloth.foreign import Schema, checked, validated

_LARGEST, _LARGEST_ALPHA = 2**31 - 1, 1e6  # of alpha: what an adapter's reader takes


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or (_is_integer(value) and value in (0, 1))


def _are_all(holds: Any, value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) and all(map(holds, value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or _are_all(lambda part: isinstance(part, str), value)


# Values stay as they came (NumPy's numbers, sets, ranges): PEFT takes them.
_Switch = Annotated[Any, checked("True or False", _is_switch)]
_Text = Annotated[Any, checked("a string", lambda value: isinstance(value, str))]
_Names = Annotated[Any, checked("a string or a list of strings", _are_texts)]
_Integer = Annotated[Any, checked("an integer", _is_integer)]
_Positive = Annotated[Any, checked("a positive integer below 2^31", lambda value: _is_integer(value) and 0 < value <= _LARGEST)]
_Count = Annotated[Any, checked("an integer from 0 to 2^31", lambda value: _is_integer(value) and 0 <= value <= _LARGEST)]
_Seed = Annotated[Any, checked("an integer from 0 to 2^32 - 1", lambda value: _is_integer(value) and 0 <= value < 2**32)]
_Number = Annotated[Any, checked("a finite number", _is_number)]
_FromZero = Annotated[Any, checked("a number from 0 on", lambda value: _is_number(value) and value >= 0)]
_BelowOne = Annotated[Any, checked("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)]


class LoadValues(Schema):
    """Of `from_pretrained`; None is what was not given. max_seq_length: 0 is the model's own, as None is."""

    max_seq_length: _Count = None
    load_in_4bit: _Switch = None
    load_in_16bit: _Switch = None
    rope_scaling: Annotated[Any, checked("a mapping", lambda value: isinstance(value, Mapping))] = None
    token: Annotated[Any, checked("a string, True or False", lambda value: isinstance(value, str | bool))] = None
    revision: _Text = None
    cache_dir: Annotated[Any, checked("a path", lambda value: isinstance(value, str | os.PathLike))] = None
    local_files_only: _Switch = None


class AdaptValues(Schema):
    """Of `get_peft_model`."""

    r: _Positive
    target_modules: _Names
    lora_alpha: Annotated[
        Any, checked("a number above 0, at most 1e6", lambda value: _is_number(value) and 0 < value <= _LARGEST_ALPHA)
    ]
    lora_dropout: _BelowOne
    layers_to_transform: Annotated[
        Any, checked("an integer or a list of integers", lambda value: _is_integer(value) or _are_all(_is_integer, value))
    ] = None
    layers_pattern: _Names = None
    random_state: _Integer
    use_rslora: _Switch = None
    modules_to_save: _Names = None
    finetune_language_layers: _Switch = None
    finetune_attention_modules: _Switch = None
    finetune_mlp_modules: _Switch = None


class TrainerValues(Schema):
    """Of the native trainers' configs, which are plain dataclasses that take anything; None is what was not given, where it may
    be. What transformers' own constructor checks is left to it."""

    per_device_train_batch_size: _Positive
    per_device_eval_batch_size: _Positive
    gradient_accumulation_steps: _Positive
    max_steps: _Integer
    num_train_epochs: _Number
    learning_rate: _FromZero
    embedding_learning_rate: _FromZero = None
    weight_decay: _FromZero
    adam_beta1: _BelowOne
    adam_beta2: _BelowOne
    adam_epsilon: Annotated[Any, checked("a number above 0", lambda value: _is_number(value) and value > 0)]
    max_grad_norm: _Number = None
    seed: _Seed
    data_seed: _Seed = None
    save_total_limit: _Integer = None
    max_length: _Count = None
    pad_to_multiple_of: Annotated[
        Any, checked("a positive integer or 'auto'", lambda value: value == "auto" or (_is_integer(value) and value > 0))
    ] = None
    packing: _Switch = None
    completion_only_loss: _Switch = None
    assistant_only_loss: _Switch = None


def check_values(function: str, schema: type[Schema], given: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an argument can't be what it is; every one of them is named, with what must hold and what was got.
    """
    validated(schema, given, function)
