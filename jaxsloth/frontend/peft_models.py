"""PEFT's models over the module model: made, loaded, and told how to keep activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import peft
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from jaxsloth.backend import CheckpointingName
from jaxsloth.convert.peft_adapter import fitted_adapter
from jaxsloth.frontend.adapters import base_of, native_spec, pull
from jaxsloth.frontend.as_before import as_before
from jaxsloth.frontend.module.causal_lm import JaxslothForCausalLM
from jaxsloth.frontend.module.peft_adoption import active_parts
from jaxsloth.frontend.module.placeholders import Placeholder, PlaceholderWriteError
from jaxsloth.frontend.saving import save_as
from jaxsloth.models.spec import Lora
from jaxsloth.training.initialize import initial_adapters


class _Fast:
    """What PEFT's model of a model of FastLanguageModel has besides: it writes merged models too, and a change of its adapters
    that fails changes nothing."""

    def save_pretrained(self, save_directory: str, *arguments: Any, save_format: str | None = None, **settings: Any) -> None:
        """PEFT's own, the adapter; with save_format the merged model, as `saving.save_as` writes it."""
        if save_format is None:
            super().save_pretrained(save_directory, *arguments, **settings)  # type: ignore[misc]
        else:
            save_as(base_of(self), Path(save_directory), save_format, **settings)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by torch's DistributedDataParallel: placeholders are not sent to other processes, each of which has the base."""
        return [name for name, own in self.named_parameters() if isinstance(own, Placeholder)]  # type: ignore[attr-defined]

    def load_adapter(self, model_id: Any, adapter_name: str, *arguments: Any, **settings: Any) -> Any:
        known = adapter_name in self.peft_config  # type: ignore[attr-defined]
        with as_before(self, values=known):  # type: ignore[arg-type]
            return super().load_adapter(model_id, adapter_name, *arguments, **settings)  # type: ignore[misc]

    def add_adapter(self, *arguments: Any, **settings: Any) -> Any:
        with as_before(self, values=False):  # type: ignore[arg-type]
            return super().add_adapter(*arguments, **settings)  # type: ignore[misc]

    def set_adapter(self, *arguments: Any, **settings: Any) -> Any:
        with as_before(self, values=False):  # type: ignore[arg-type]
            return super().set_adapter(*arguments, **settings)  # type: ignore[misc]


class FastPeftModel(_Fast, peft.PeftModelForCausalLM):
    """What `get_peft_model` returns."""


class FastTasklessPeftModel(_Fast, peft.PeftModel):
    """Of a LoraConfig without a task_type."""


_OURS: dict[type, type] = {peft.PeftModelForCausalLM: FastPeftModel, peft.PeftModel: FastTasklessPeftModel}


def _adopt(wrapper: nn.Module, name: str, tuner: nn.Module | None) -> None:
    """A hook of torch's, told of every module that a module is given: a model that PEFT wraps is ours from then on.

    Merging is refused: PEFT would put what is trained whole in the base's place, and only then would a layer's weights refuse
    to be written.
    """
    if name != "base_model" or type(wrapper) not in _OURS or not isinstance(tuner, nn.Module):
        return
    if isinstance(vars(tuner)["_modules"].get("model", tuner), JaxslothForCausalLM):
        wrapper.__class__ = _OURS[type(wrapper)]
        tuner.merge_and_unload = _refuse_merge  # type: ignore[assignment]


register_module_module_registration_hook(_adopt)


def wrap(
    model: Any, modules: Sequence[str], saved: Sequence[str], init: Literal["kaiming", "gaussian"], seed: int, **settings: Any
) -> peft.PeftModel:
    """A PeftModel with fresh adapters on `modules`, drawn from the seed as a recipe's are, that trains `saved` whole (both full
    names), and biases where settings, LoraConfig's, say so."""
    names = [name.rpartition(".")[2] for name in saved] or None  # as PEFT's users name them
    config = peft.LoraConfig(target_modules=list(modules), modules_to_save=names, task_type="CAUSAL_LM", **settings)
    engine = model.engine.model
    drawn = Lora(settings["r"], 1.0, 1.0, 0.0, tuple(modules), modules_to_save=tuple(saved), bias=settings["bias"])
    shapes = replace(engine.spec, lora=drawn)
    with as_before(model):
        wrapped: Any = peft.get_peft_model(model, config)
        pull(model, initial_adapters(shapes, init, seed, engine.base_tensor))
    return wrapped


def wrapped_by(model: Any, config: Any) -> peft.PeftModel:
    """The PeftModel of a native trainer's peft_config.

    Raises:
        ValueError: the backend can't train what it makes; the model stays as it was.
    """
    with as_before(model):
        wrapped = peft.get_peft_model(model, config)
        base = base_of(wrapped)
        native_spec(base, active_parts(base, base.engine.model.spec))
    return wrapped


def load_adapter(model: Any, folder: Path) -> peft.PeftModel:
    """The PeftModel of a saved adapter, trainable.

    Raises:
        ValueError: it is not whole, not one of this model, or of a kind that the backends don't compute.
    """
    spec, _ = fitted_adapter(folder, model.engine.model.spec)
    config = peft.PeftConfig.from_pretrained(str(folder))
    if spec.lora is not None and spec.lora.modules_to_save:  # PEFT's save_embedding_layers stores some without a word
        config.modules_to_save = [name.rpartition(".")[2] for name in spec.lora.modules_to_save]  # type: ignore[attr-defined]
    with as_before(model):
        wrapped = peft.PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)
        active_parts(model, model.engine.model.spec)
    return wrapped.eval()


def _refuse_merge(*arguments: Any, **settings: Any) -> NoReturn:
    raise PlaceholderWriteError(
        "merge_and_unload can't write the base, whose weights are not in torch; save_pretrained_merged writes the merged "
        "model, from which it can be loaded again"
    )


def set_checkpointing(model: Any, name: CheckpointingName) -> None:
    """For the backend's own steps, and for passes of the module."""
    base = base_of(model)
    if base.engine.model.options.gradient_checkpointing != name:
        base.engine.model.set_gradient_checkpointing(name)
    base.model.gradient_checkpointing = name not in ("none", "auto")
