"""SFTTrainer: TRL's trainer, its names and its losses, over a backend's own train step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import DefaultFlowCallback, PrinterCallback, ProgressCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from jaxsloth.batch import IGNORE, Batch
from jaxsloth.data.encode import Example
from jaxsloth.data.windows import FILLER_ROW, WindowStream, eval_batches
from jaxsloth.frontend.adapters import base_of, give_backend, show_backend, take_back
from jaxsloth.frontend.arguments import refuse_unknown, refuse_where_set, warn_where_set
from jaxsloth.frontend.language_model import FastModelForCausalLM
from jaxsloth.frontend.metrics import predictions
from jaxsloth.frontend.peft_models import set_checkpointing
from jaxsloth.frontend.sft_config import SFTConfig, accept, check_precision
from jaxsloth.frontend.sft_data import encode
from jaxsloth.frontend.sft_run import SFTRun, checkpoint_to_resume, learning_rates, optimizer_options, visiting_order

__all__ = ["SFTConfig", "SFTTrainer"]

_PAD = 64  # few lengths, so that a compiling backend compiles few programs
# Arguments of today's that older notebooks gave to the trainer: taken over into args.
_ONCE_HERE = ("dataset_text_field", "packing", "dataset_num_proc", "neftune_noise_alpha")
_REFUSED: dict[str, tuple[Any, str]] = {
    "compute_loss_func": (None, "the loss is plain cross-entropy, formed inside the backend's step; use TRL's trainer"),
    "optimizers": ((None, None), "the optimizer is the backend's; choose it by args.optim"),
    "optimizer_cls_and_kwargs": (None, "the optimizer is the backend's; choose it by args.optim"),
    "quantization_config": (None, "load the model with load_in_4bit=True"),
    "model_init": (None, "give the model itself"),
}
_UNUSED: dict[str, tuple[Any, str]] = {
    "dataset_batch_size": (None, "rows are tokenized one by one"),
    "num_of_sequences": (None, "packing takes all rows"),
    "chars_per_token": (None, "packing counts tokens"),
    "dataset_kwargs": (None, "rows are prepared by what they hold"),
    "infinite": (None, "epochs repeat until max_steps"),
}
# Collators whose batches are those that this trainer makes; labels are its own, so EOS is learnt also where it pads.
_COLLATORS = ("DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DefaultDataCollator", "DataCollatorWithPadding")


class SFTTrainer:
    """Supervised fine-tuning of a model's adapters. Rows are what `sft_data.encode` takes; args are an SFTConfig, TRL's, or
    transformers' TrainingArguments.

    examples and held_out are the rows as tokens; train_dataset and eval_dataset show them as dicts. Evaluation losses are
    transformers': each batch's mean, weighted by its rows.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: Sequence[Any] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        tokenizer: Any = None,
        max_seq_length: int | None = None,
        **others: Any,
    ) -> None:
        self._check(others)
        self.base = base_of(model)
        if not isinstance(self.base, FastModelForCausalLM):
            raise TypeError(
                f"this trainer trains models of FastLanguageModel.from_pretrained, and {type(self.base).__name__} came; "
                "transformers' own models train with TRL's SFTTrainer"
            )
        self.args = accept(args)
        for name in _ONCE_HERE:
            if others.get(name) is not None:
                setattr(self.args, name, others[name])
        check_precision(self.args, self.base.engine.model.options.dtype)
        if peft_config is not None:
            import peft

            model = peft.get_peft_model(model, peft_config)
        self.model: Any = model
        if self.args.gradient_checkpointing and self.base.engine.model.options.gradient_checkpointing == "none":
            set_checkpointing(model, "full")
        self.processing_class = processing_class or tokenizer or self.base.tokenizer
        _check_collator(data_collator)
        self.max_length = max_seq_length or self.args.max_length or self.base.max_seq_length
        self.compute_metrics, self._preprocess = compute_metrics, preprocess_logits_for_metrics
        self._devices = self.base.loaded.backend.devices()
        self._formatting = formatting_func
        if train_dataset is None:
            raise ValueError("train_dataset is needed")
        if isinstance(eval_dataset, Mapping):
            raise ValueError("eval_dataset must be one data set, and a dict of them came; give one, and evaluate() on others")
        if self._evaluates() and eval_dataset is None:
            raise ValueError(f"eval_strategy is {self.args.eval_strategy}, and there is no eval_dataset; give one, or set 'no'")
        optimizer_options(self.args, "float32")
        learning_rates(self.args, 10)
        visiting_order(self.args)
        held_out = None if eval_dataset is None else self._encode(eval_dataset, "eval_dataset")
        self.replace_examples(self._encode(train_dataset, "train_dataset"), held_out)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_local_process_zero = self.state.is_world_process_zero = self._devices.rank == 0
        progress = PrinterCallback if self.args.disable_tqdm else ProgressCallback
        own = [DefaultFlowCallback, *get_reporting_integration_callbacks(self.args.report_to), *(callbacks or ())]
        if self._devices.rank == 0:
            own.append(progress)
        self.callback_handler = CallbackHandler(own, self.model, self.processing_class, None, None)
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    @staticmethod
    def _check(others: Mapping[str, Any]) -> None:
        known = {*_ONCE_HERE, *_REFUSED, *_UNUSED}
        unknown = {name: value for name, value in others.items() if name not in known}
        refuse_unknown("SFTTrainer", {*known, *SFTTrainer.__init__.__annotations__} - {"return"}, unknown)
        refuse_where_set("SFTTrainer", others, _REFUSED)
        warn_where_set("SFTTrainer", others, _UNUSED)

    def _evaluates(self) -> bool:
        return str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no" or self.args.eval_on_start

    def _encode(self, rows: Iterable[Mapping[str, Any]], name: str) -> list[Example]:
        vocab = self.base.engine.model.spec.embedding.vocab
        return encode(rows, self.processing_class, self.args, self.max_length, self._formatting, vocab, name)

    def replace_examples(self, examples: list[Example], held_out: list[Example] | None) -> None:
        """Trains and evaluates on these from now on."""
        self.examples, self.held_out = examples, held_out

    @property
    def train_dataset(self) -> list[dict[str, list[int]]]:
        return [_shown(example) for example in self.examples]

    @property
    def eval_dataset(self) -> list[dict[str, list[int]]] | None:
        return None if self.held_out is None else [_shown(example) for example in self.held_out]

    @property
    def tokenizer(self) -> Any:
        return self.processing_class

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.remove_callback(callback)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Trains up to args.max_steps, or for args.num_train_epochs.

        Raises:
            ValueError: the model has no adapter, or no checkpoint to resume from.
            NonFiniteLossError: a step's loss is NaN or infinite; the checkpoints before it stay.
        """
        resume = checkpoint_to_resume(self.args, resume_from_checkpoint)
        self.model.train()
        give_backend(self.base)
        engine = self.base.engine.model
        self.base.behind = partial(_write_back, self.base)
        self.state.global_step, self.state.epoch, self.state.log_history = 0, 0.0, []
        args = self.args
        pad = args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else _PAD
        windows = WindowStream(
            self.examples,
            batch_size=args.per_device_train_batch_size * self._devices.count,
            accumulation=args.gradient_accumulation_steps,
            seed=args.seed,
            shuffle=True,
            packing=args.packing,
            max_length=max(self.max_length, max(len(example.tokens) for example in self.examples)),
            pad_to_multiple_of=pad,
            devices=self._devices.count,
            order=visiting_order(args),
        )
        self._run = SFTRun(
            args,
            engine,
            self.base.loaded.backend,
            windows,
            self.state,
            self.control,
            self.callback_handler,
            self.evaluate if self.held_out else None,
            self.base.behind,
            self.processing_class,
            self.base.config.name_or_path,
        )
        try:
            return TrainOutput(*self._run.train(resume))
        finally:
            self.base.behind()
            self.base.behind = None

    def evaluate(
        self, eval_dataset: Iterable[Mapping[str, Any]] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The held-out loss, with what compute_metrics adds; logged, and told to the callbacks."""
        held_out = self.held_out if eval_dataset is None else self._encode(eval_dataset, "eval_dataset")
        if not held_out:
            raise ValueError("there is nothing to evaluate on; give eval_dataset")
        if self.base.behind is None:
            show_backend(self.base)
        start = time.perf_counter()
        size = self.args.per_device_eval_batch_size * self._devices.count
        longest = max(len(example.tokens) for example in held_out)
        batches = eval_batches(held_out, size, _PAD, longest, self._devices.count)
        metrics = {f"{metric_key_prefix}_loss": self._loss(batches)}
        if self.compute_metrics is not None:
            own = self.compute_metrics(predictions(self.model, batches, self._preprocess))
            metrics |= {
                name if name.startswith(metric_key_prefix) else f"{metric_key_prefix}_{name}": own[name] for name in own
            }
        seconds = time.perf_counter() - start
        metrics[f"{metric_key_prefix}_runtime"] = round(seconds, 4)
        metrics[f"{metric_key_prefix}_samples_per_second"] = round(len(held_out) / seconds, 3)
        metrics[f"{metric_key_prefix}_steps_per_second"] = round(len(batches) / seconds, 3)
        logs = metrics | {"epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return logs

    def _loss(self, batches: Sequence[Batch]) -> float:
        step = self.base.engine.model.eval_step()
        results = [(step(batch), int(np.count_nonzero(batch.rows != FILLER_ROW))) for batch in batches]
        sums = [(float(total) / tokens, rows) for (total, tokens), rows in results]
        return sum(mean * rows for mean, rows in sums) / sum(rows for _, rows in sums)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """The adapter as PEFT saves it, and the tokenizer."""
        folder = str(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def save_state(self) -> None:
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(str(Path(self.args.output_dir) / "trainer_state.json"))


def _write_back(base: Any) -> None:
    take_back(base, base.engine.model.trainable())


def _shown(example: Example) -> dict[str, list[int]]:
    labels = np.where(example.learn, example.tokens, IGNORE).tolist()
    return {"input_ids": example.tokens.tolist(), "attention_mask": [1] * len(labels), "labels": labels}


def _check_collator(collator: Any) -> None:
    if collator is None:
        return
    name = type(collator).__name__
    if name not in _COLLATORS:
        raise ValueError(
            f"data_collator must be one of {', '.join(_COLLATORS)}, and {name} came: batches are made by this trainer. Mask "
            "labels in the rows (input_ids with labels), by completion_only_loss, or by train_on_responses_only"
        )
    if getattr(collator, "mlm", False):
        raise ValueError("data_collator has mlm=True, and a causal model learns the next token; set mlm=False")
