"""FastLanguageModel: loading, adapting, answering and saving, under the names that Unsloth's users know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from jaxsloth.backend import BuildOptions, DeviceInfo, DtypeName, Model
from jaxsloth.convert.checkpoint import open_checkpoint, resolve_path
from jaxsloth.convert.peft_adapter import CONFIG, AdapterConfig, read_adapter, write_adapter
from jaxsloth.convert.safetensors_source import CheckpointError, check_shapes
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.frontend.arguments import refuse_unknown
from jaxsloth.generation import GenerationSettings, generate
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import ModelSpec
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.training.run import choose_backend
from jaxsloth.transforms import ALL_LINEAR, add_lora, quantize


class LanguageModel:
    """A model of either backend with its tokenizer. `model` is the backend's `Model`."""

    def __init__(self, model: Model, tokenizer: Any, backend: str, base_model: str, max_length: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.backend, self.base_model, self.max_length = backend, base_model, max_length

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        on_text: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> Any:
        """Answers a text, texts or rows of token ids; settings are `GenerationSettings`' fields.

        Returns:
            What came in, answered: a text, a list of texts, or a list of lists of new token ids. Special tokens written out in
            a text (a rendered chat template) count as such, and none are added to it.
        """
        refuse_unknown("generate", inspect.signature(GenerationSettings).parameters, _unknown(GenerationSettings, settings))
        chosen = GenerationSettings(**settings)
        if isinstance(prompts, str):
            return self._answer([prompts], chosen, on_text)[0]
        if all(isinstance(prompt, str) for prompt in prompts):
            return self._answer(cast(Sequence[str], prompts), chosen, on_text)
        rows = cast(Sequence[Sequence[int]], prompts)
        return generate(self.model, rows, chosen, tokenizer=self.tokenizer, on_text=on_text)

    def _answer(
        self, texts: Sequence[str], settings: GenerationSettings, on_text: Callable[[int, str], None] | None
    ) -> list[str]:
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        answers = ["" for _ in rows]

        def collect(row: int, text: str) -> None:
            answers[row] += text
            if on_text is not None:
                on_text(row, text)

        generate(self.model, rows, settings, tokenizer=self.tokenizer, on_text=collect)
        return answers

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the adapter as PEFT does, with the tokenizer beside it.

        Raises:
            ExistsError: the folder exists and overwrite is False.
            ValueError: the model has no adapter.
        """
        if self.spec.lora is None:
            raise ValueError("the model has no adapter to save; call FastLanguageModel.get_peft_model first")
        write_adapter(Path(folder), self.spec, self.model.trainable(), self.base_model, overwrite=overwrite)
        self.tokenizer.save_pretrained(str(folder))


class FastLanguageModel:
    """The two calls that every script begins with."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = False,
        backend: str | None = None,
        use_gradient_checkpointing: bool | str = False,
        **unknown: Any,
    ) -> tuple[LanguageModel, Any]:
        """Loads a model and its tokenizer.

        Args:
            model_name: a folder of safetensors, a .gguf file, ``package:NAME/file``, a Hugging Face name, or the folder of a
                PEFT adapter, whose base is then loaded with it.
            dtype: "float32", "bfloat16", "float16" or the framework's own; None: bfloat16 on a GPU, float32 on a CPU.
            load_in_4bit: store the linear layers as nested NF4.
            backend: "torch" or "jax"; None: the one that sees an accelerator, JAX when both or neither do.

        Raises:
            TypeError: an argument that it does not have, with the nearest one that it has.
            ValueError: the checkpoint can't be read or is not supported.
        """
        refuse_unknown("from_pretrained", inspect.signature(FastLanguageModel.from_pretrained).parameters, unknown)
        adapter = None
        if (Path(model_name) / CONFIG).is_file():
            adapter = read_adapter(Path(model_name))
            if adapter[0].base_model is None:
                raise CheckpointError(f"{model_name}/{CONFIG} does not name its base model")
        opened = open_checkpoint(resolve_path(model_name if adapter is None else str(adapter[0].base_model)))
        engine = choose_backend(backend or "auto")
        spec = spec_from_config(opened.config)
        check_shapes(opened.source, tensor_shapes(spec))
        tokenizer = load_tokenizer(opened.path)
        if load_in_4bit:
            spec = quantize(spec, nested=True)
        checkpointing = "full" if use_gradient_checkpointing not in (False, "none") else "none"
        options = BuildOptions(_dtype_name(dtype, engine.devices()), checkpointing)
        model = engine.build(spec, opened.source, options)
        if adapter is not None:
            config: AdapterConfig = adapter[0]
            model.add_adapters(config.apply(spec), adapter[1])
        return LanguageModel(model, tokenizer, engine.name, str(opened.path), max_seq_length), tokenizer

    @staticmethod
    def get_peft_model(
        model: LanguageModel,
        r: int = 16,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: Any = "none",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        **unknown: Any,
    ) -> LanguageModel:
        """Adds LoRA adapters, drawn from random_state; the same model is returned.

        Raises:
            TypeError: an argument that it does not have, with the nearest one that it has.
            ValueError: a target matches nothing, or the model has adapters already.
        """
        refuse_unknown("get_peft_model", inspect.signature(FastLanguageModel.get_peft_model).parameters, unknown)
        if model.spec.lora is not None:
            raise ValueError("the model has adapters already; load the base again to begin anew")
        if init_lora_weights not in (True, "gaussian"):
            raise ValueError(f"init_lora_weights must be True or 'gaussian', and {init_lora_weights!r} came")
        spec = add_lora(
            model.spec,
            r=r,
            alpha=float(lora_alpha),
            targets=target_modules,
            dropout=lora_dropout,
            rslora=use_rslora,
            bias=bias,
            modules_to_save=modules_to_save or (),
        )
        init = "gaussian" if init_lora_weights == "gaussian" else "kaiming"
        model.model.add_adapters(spec, initial_adapters(spec, init, random_state, model.model.base_tensor))
        return model


def _unknown(owner: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in inspect.signature(owner).parameters}


def _dtype_name(dtype: Any, devices: DeviceInfo) -> DtypeName:
    """A dtype's name, from its name or from a framework's own (torch.bfloat16, jnp.bfloat16)."""
    if dtype is None:
        return "float32" if devices.platform == "cpu" else "bfloat16"
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = name.removeprefix("torch.")
    if name not in get_args(DtypeName):
        raise ValueError(f"dtype must be one of {list(get_args(DtypeName))} or None, and {dtype!r} came")
    return cast(DtypeName, name)
