"""SFTTrainer over the native loop, with TRL's names for its basic arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxsloth.backend import load_backend
from jaxsloth.data.encode import Example, encode_rows
from jaxsloth.frontend.language_model import LanguageModel
from jaxsloth.recipe import Recipe, make_recipe
from jaxsloth.training.records import RunResult
from jaxsloth.training.run import check_output, execute, plan_from_examples


@dataclass(frozen=True)
class SFTConfig:
    """TRL's and transformers' names. A micro-batch has per_device_train_batch_size rows on every device."""

    output_dir: str
    per_device_train_batch_size: int = 2
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    max_steps: int = -1
    num_train_epochs: float = 3.0
    logging_steps: int = 1
    save_steps: int | None = None
    save_total_limit: int = 2
    eval_steps: int | None = None
    max_length: int = 1024
    packing: bool = False
    completion_only_loss: bool = True
    truncation: bool = True
    seed: int = 42

    def recipe(self, model: LanguageModel, devices: int, has_eval: bool) -> Recipe:
        """The same run as a recipe; RecipeError names what can't be."""
        lora = model.spec.lora
        if lora is None:
            raise ValueError("the model has no adapters to train; call FastLanguageModel.get_peft_model first")
        return make_recipe(
            {
                "model": model.base_model,
                "backend": model.backend,
                "dtype": model.model.options.dtype,
                "quantization": _quantization(model),
                "gradient_checkpointing": model.model.options.gradient_checkpointing,
                "lora": {
                    "r": lora.r,
                    "alpha": lora.alpha,
                    "dropout": lora.dropout,
                    "targets": list(lora.modules),
                    "rslora": lora.rslora,
                    "bias": lora.bias,
                    "modules_to_save": list(lora.modules_to_save),
                },
                "data": {
                    "path": "in memory",
                    "validation_path": "in memory" if has_eval else None,
                    "max_length": self.max_length,
                    "packing": self.packing,
                    "response_only": self.completion_only_loss,
                    "truncation": self.truncation,
                },
                "optimizer": {
                    "learning_rate": self.learning_rate,
                    "weight_decay": self.weight_decay,
                    "betas": [self.adam_beta1, self.adam_beta2],
                    "eps": self.adam_epsilon,
                    "max_grad_norm": self.max_grad_norm or None,
                },
                "schedule": {
                    "kind": self.lr_scheduler_type,
                    "warmup_steps": self.warmup_steps,
                    "warmup_ratio": self.warmup_ratio,
                },
                **({"steps": self.max_steps} if self.max_steps > 0 else {"epochs": self.num_train_epochs}),
                "batch_size": self.per_device_train_batch_size * devices,
                "accumulation": self.gradient_accumulation_steps,
                "evaluation": {"every": self.eval_steps, "batch_size": self.per_device_eval_batch_size * devices},
                "checkpoints": {"output": self.output_dir, "every": self.save_steps, "keep": self.save_total_limit},
                "log_every": self.logging_steps,
                "seed": self.seed,
            },
            origin="SFTConfig",
        )


@dataclass(frozen=True)
class TrainOutput:
    """What `SFTTrainer.train` returns: transformers' names over the run's result."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]
    result: RunResult


class SFTTrainer:
    """Supervised fine-tuning of a model with adapters on rows in memory (dicts, or a datasets.Dataset).

    Rows are what recipes take: messages, prompt and completion, alpaca fields, text, or input_ids.
    """

    def __init__(
        self,
        model: LanguageModel,
        args: SFTConfig,
        train_dataset: Iterable[Mapping[str, Any]],
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
    ) -> None:
        self.model, self.args = model, args
        backend = load_backend(model.backend)
        self.recipe = args.recipe(model, backend.devices().count, eval_dataset is not None)
        self.processing_class = processing_class or model.tokenizer
        check_output(self.recipe, resume=False)
        held_out = None if eval_dataset is None else self._encode(eval_dataset)
        self.replace_examples(self._encode(train_dataset), held_out)

    def replace_examples(self, examples: list[Example], held_out: list[Example] | None) -> None:
        """Trains and evaluates on these from now on."""
        self.examples, self.held_out = examples, held_out
        self._plan = plan_from_examples(self.recipe, self.model.spec, self.model.base_model, examples, held_out)

    def _encode(self, rows: Iterable[Mapping[str, Any]]) -> list[Example]:
        vocab = self.model.spec.embedding.vocab
        return encode_rows([dict(row) for row in rows], self.processing_class, self.recipe.data, vocab)

    def train(self) -> TrainOutput:
        result = execute(self._plan, self.model.model)
        losses = [entry["loss"] for entry in result.entries if "loss" in entry]
        mean = sum(losses) / len(losses)
        metrics = {"train_loss": mean, "train_runtime": result.seconds, "train_tokens": float(result.tokens)}
        if result.eval_loss is not None:
            metrics["eval_loss"] = result.eval_loss
        return TrainOutput(result.steps, mean, metrics, result)


def _quantization(model: LanguageModel) -> str:
    if model.spec.quantization is None:
        return "none"
    return "nf4-nested" if model.spec.quantization.nested else "nf4"
