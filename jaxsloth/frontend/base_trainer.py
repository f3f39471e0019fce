"""What the native trainers share: their arguments, their data as tokens, and transformers' flow around a backend's step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import DefaultFlowCallback, PrinterCallback, ProgressCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from jaxsloth.backend import OptimizerOptions
from jaxsloth.batch import Batch, check_length
from jaxsloth.data.encode import Example
from jaxsloth.data.windows import FILLER_ROW, WindowStream, eval_batches
from jaxsloth.frontend.adapters import base_of, give_backend, show_backend, take_back
from jaxsloth.frontend.arguments import refuse_unknown, refuse_where_set, warn_where_set
from jaxsloth.frontend.language_model import FastModelForCausalLM
from jaxsloth.frontend.metrics import predictions
from jaxsloth.frontend.peft_models import set_checkpointing
from jaxsloth.frontend.rows import check_rows, rows_needed
from jaxsloth.frontend.trainer_config import Reasons, Rules, check_precision
from jaxsloth.frontend.trainer_run import (
    Metrics,
    Step,
    TrainerRun,
    checkpoint_to_resume,
    deciding,
    in_order,
    learning_rates,
    optimizer_options,
    visiting_order,
)
from jaxsloth.training.fingerprints import check_kinds, fingerprints
from jaxsloth.training.lock import lock

Rows = Iterable[Mapping[str, Any]]
PAD = 64  # few lengths, so that a compiling backend compiles few programs
REFUSED: Reasons = {
    "compute_loss_func": (None, "the loss is formed inside the backend's step; use TRL's trainer"),
    "optimizers": ((None, None), "the optimizer is the backend's; choose it by args.optim"),
    "optimizer_cls_and_kwargs": (None, "the optimizer is the backend's; choose it by args.optim"),
    "quantization_config": (None, "load the model with load_in_4bit=True"),
    "model_init": (None, "give the model itself"),
}


class BaseTrainer:
    """A trainer of a model's adapters. What it learns: `examples`, and `held_out` to evaluate on; train_dataset and
    eval_dataset show them as dicts.

    A trainer says which config it takes (rules, config), which arguments of its own it refuses or names in a warning, those of
    today's config that notebooks gave to the trainer (taken_over), and how many examples make one sample (together).
    """

    rules: ClassVar[Rules]
    config: ClassVar[type[Any]]
    refused: ClassVar[Reasons] = REFUSED
    unused: ClassVar[Reasons] = {}
    taken_over: ClassVar[tuple[str, ...]] = ()
    together: ClassVar[int] = 1

    examples: list[Example]
    held_out: list[Example] | None
    compute_metrics: Callable[[Any], dict[str, float]] | None
    _preprocess: Callable[[Any, Any], Any] | None

    def __init__(self, model: Any, args: Any, processing_class: Any, peft_config: Any, others: Mapping[str, Any]) -> None:
        """Looks at all that came, but the data (`_begin`)."""
        self._check(others)
        self.base = ours(model, type(self).__name__)
        self.args = self.rules.accept(args, self.config)
        given = {name: others[name] for name in self.taken_over if others.get(name) is not None}
        if given:
            self.args = copy.copy(self.args)  # the user's own may serve another trainer
            for name, value in given.items():
                setattr(self.args, name, value)
        check_precision(self.args, self.base.engine.model.options.dtype)
        if peft_config is not None:
            import peft

            model = peft.get_peft_model(model, peft_config)
        self.model: Any = model
        if self.args.gradient_checkpointing and self.base.engine.model.options.gradient_checkpointing == "none":
            set_checkpointing(model, "full")
        self.processing_class = processing_class or self.base.tokenizer
        self.max_length = self.args.max_length or self.base.max_seq_length
        self._devices = self.base.loaded.backend.devices()

    def _begin(self, train_dataset: Rows | None, eval_dataset: Rows | None, callbacks: Sequence[Any] | None) -> None:
        """Reads the data, and tells the callbacks that the trainer is made."""
        if train_dataset is None:
            raise ValueError("train_dataset is needed")
        check_rows(train_dataset, "train_dataset")
        check_rows(eval_dataset, "eval_dataset")
        rows_a_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self._devices.count
        limit = rows_needed(train_dataset, self.args, rows_a_step)
        self._order = in_order if limit is not None else visiting_order(self.args)  # as transformers' samplers
        if self._evaluates() and eval_dataset is None:
            raise ValueError(f"eval_strategy is {self.args.eval_strategy}, and there is no eval_dataset; give one, or set 'no'")
        optimizer_options(self.args, "float32")
        learning_rates(self.args, 10)
        held_out = None if eval_dataset is None else self._encode(eval_dataset, "eval_dataset")
        self.replace_examples(self._encode(train_dataset, "train_dataset", limit), held_out)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_local_process_zero = self.state.is_world_process_zero = self._devices.rank == 0
        progress = PrinterCallback if self.args.disable_tqdm else ProgressCallback
        own = [DefaultFlowCallback, *get_reporting_integration_callbacks(self.args.report_to), *(callbacks or ())]
        if self._devices.rank == 0:
            own.append(progress)
        self.callback_handler = CallbackHandler(own, self.model, self.processing_class, None, None)
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    @classmethod
    def _check(cls, others: Mapping[str, Any]) -> None:
        known = {*cls.taken_over, *cls.refused, *cls.unused}
        unknown = {name: value for name, value in others.items() if name not in known}
        refuse_unknown(cls.__name__, {*known, *cls.__init__.__annotations__} - {"return"}, unknown)
        refuse_where_set(cls.__name__, others, cls.refused)
        warn_where_set(cls.__name__, others, cls.unused)

    def _evaluates(self) -> bool:
        return str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no" or self.args.eval_on_start

    def _encode(self, rows: Rows, name: str, limit: int | None = None) -> list[Example]:
        """Rows as examples, `together` of them a sample. limit: how many rows are read at most."""
        raise NotImplementedError

    def _make_step(self, options: OptimizerOptions) -> Step:
        raise NotImplementedError

    def _measure(self, result: Any) -> Sequence[Metrics]:
        """What is logged of a step's result beside its loss: a dict a micro-batch."""
        del result
        return ()

    def _evaluate(self, held_out: list[Example], batches: Sequence[Batch]) -> dict[str, float]:
        """The metrics of held-out examples, "loss" among them."""
        raise NotImplementedError

    def _shown(self, examples: list[Example]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def replace_examples(self, examples: list[Example], held_out: list[Example] | None) -> None:
        """Trains and evaluates on these from now on."""
        self.examples, self.held_out = examples, held_out

    @property
    def train_dataset(self) -> list[dict[str, Any]]:
        return self._shown(self.examples)

    @property
    def eval_dataset(self) -> list[dict[str, Any]] | None:
        return None if self.held_out is None else self._shown(self.held_out)

    @property
    def tokenizer(self) -> Any:
        return self.processing_class

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.remove_callback(callback)

    def train(self, resume_from_checkpoint: bool | str | None = None, resume_anyway: Collection[str] = ()) -> TrainOutput:
        """Trains up to args.max_steps, or for args.num_train_epochs.

        Args:
            resume_anyway: of "data", "base", "template" and "recipe" (the arguments), what may have changed since the
                checkpoint that is gone on from.

        Raises:
            ValueError: the model has no adapter, no checkpoint to resume from, or another run saves to output_dir.
            NonFiniteLossError: a step's loss is NaN or infinite; the checkpoints before it stay.
        """
        anyway = check_kinds(resume_anyway, "resume_anyway")
        saves = self.args.save_strategy != "no" and self.state.is_world_process_zero
        with lock(Path(self.args.output_dir)) if saves else nullcontext():
            return self._train(checkpoint_to_resume(self.args, resume_from_checkpoint), anyway)

    def _train(self, resume: Path | None, anyway: Collection[str]) -> TrainOutput:
        self.model.train()
        give_backend(self.base)
        self.base.behind = partial(_write_back, self.base)
        self.state.global_step, self.state.epoch, self.state.log_history = 0, 0.0, []
        self._run = TrainerRun(
            self.args,
            self.base.engine.model,
            self.base.loaded.backend,
            self._make_step,
            self._measure,
            self._windows(),
            self.state,
            self.control,
            self.callback_handler,
            self.evaluate if self.held_out else None,
            self.base.behind,
            self.processing_class,
            self.base.config.name_or_path or "",
            fingerprints(
                self.base.loaded.checkpoint, self.processing_class, None, self.examples, self.held_out, deciding(self.args)
            ),
            anyway,
        )
        try:
            return TrainOutput(*self._run.train(resume))
        finally:
            self.base.behind()
            self.base.behind = None

    def _windows(self, stream: Callable[..., WindowStream] = WindowStream) -> WindowStream:
        args = self.args
        check_length(longest(self.examples), self.base.engine.model.spec.max_positions)
        return stream(
            self.examples,
            batch_size=args.per_device_train_batch_size * self._devices.count * self.together,
            accumulation=args.gradient_accumulation_steps,
            seed=args.seed,
            shuffle=True,
            packing=getattr(args, "packing", False),
            max_length=max(self.max_length, longest(self.examples)),
            pad_to_multiple_of=args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else PAD,
            devices=self._devices.count,
            order=self._order,
            together=self.together,
        )

    def evaluate(self, eval_dataset: Rows | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The held-out loss and the trainer's other metrics; logged, and told to the callbacks."""
        check_rows(eval_dataset, "eval_dataset")
        held_out = self.held_out if eval_dataset is None else self._encode(eval_dataset, "eval_dataset")
        if not held_out:
            raise ValueError("there is nothing to evaluate on; give eval_dataset")
        if self.base.behind is None:
            show_backend(self.base)
        start = time.perf_counter()
        batches = self._eval_batches(held_out, self.args.per_device_eval_batch_size * self._devices.count * self.together)
        found = self._evaluate(held_out, batches)
        if self.compute_metrics is not None:
            found |= self.compute_metrics(predictions(self.model, batches, self._preprocess))
        prefix = metric_key_prefix
        metrics = {name if name.startswith(prefix) else f"{prefix}_{name}": value for name, value in found.items()}
        seconds = time.perf_counter() - start
        metrics[f"{prefix}_runtime"] = round(seconds, 4)
        metrics[f"{prefix}_samples_per_second"] = round(len(held_out) / self.together / seconds, 3)
        metrics[f"{prefix}_steps_per_second"] = round(len(batches) / seconds, 3)
        logs = metrics | {"epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return logs

    def _eval_batches(self, held_out: list[Example], size: int) -> list[Batch]:
        return eval_batches(held_out, size, PAD, longest(held_out), self._devices.count)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """The adapter as PEFT saves it, and the tokenizer."""
        folder = str(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def save_state(self) -> None:
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(str(Path(self.args.output_dir) / "trainer_state.json"))


def ours(model: Any, trainer: str) -> FastModelForCausalLM:
    """The base under the model's adapters; TypeError where it is none of ours."""
    base = base_of(model)
    if not isinstance(base, FastModelForCausalLM):
        raise TypeError(
            f"this trainer trains models of FastLanguageModel.from_pretrained, and {type(base).__name__} came; "
            f"transformers' own models train with TRL's {trainer}"
        )
    return base


def check_collator(collator: Any, allowed: Sequence[str], advice: str) -> None:
    """That a collator makes the batches that the trainer makes by itself; ValueError with the advice."""
    if collator is None:
        return
    name = type(collator).__name__
    if name not in allowed:
        raise ValueError(
            f"data_collator must be one of {', '.join(allowed)}, and {name} came: batches are made by this trainer. {advice}"
        )


def longest(examples: Sequence[Example]) -> int:
    return max(len(example.tokens) for example in examples)


def real_rows(batch: Batch) -> int:
    """How many rows of a batch don't only fill its shape."""
    return int(np.count_nonzero(batch.rows != FILLER_ROW))


def _write_back(base: Any) -> None:
    take_back(base, base.engine.model.trainable())
