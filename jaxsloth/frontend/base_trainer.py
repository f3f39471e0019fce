"""What the native trainers share: their arguments, their data as tokens, and transformers' flow around a backend's step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import (
    DefaultFlowCallback,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    TrainerControl,
    TrainerState,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import PredictionOutput, TrainOutput

from jaxsloth.backend import OptimizerOptions, Step
from jaxsloth.batch import Batch, check_length
from jaxsloth.data.encode import Example
from jaxsloth.data.step_batches import FILLER_ROW, StepBatches, eval_batches
from jaxsloth.frontend.adapters import base_of, push_for_inference
from jaxsloth.frontend.arguments import refuse_unknown, refuse_where_set, warn_once, warn_where_set
from jaxsloth.frontend.language_model import FastModelForCausalLM
from jaxsloth.frontend.metrics import asks_for_logits, check_best, predictions, token_metrics
from jaxsloth.frontend.module.peft_adoption import check_wrappers
from jaxsloth.frontend.optimizer_view import BackendOptimizer, optimizer_options, scheduler_of
from jaxsloth.frontend.peft_models import set_checkpointing, wrapped_by
from jaxsloth.frontend.rows import Held, all_of, check_rows, each, one_of, rows_needed
from jaxsloth.frontend.shared_weights import Kept, LookingHandler, SharedWeights
from jaxsloth.frontend.trainer_config import Reasons, Rules, check_precision, max_norm
from jaxsloth.frontend.trainer_run import (
    Metrics,
    TrainerRun,
    checkpoint_to_resume,
    deciding,
    in_order,
    visiting_order,
)
from jaxsloth.frontend.trainer_surface import ABSENT, Batches, TrainerSurface, overridden, refuse_overrides
from jaxsloth.training.fingerprints import check_kinds, fingerprints
from jaxsloth.training.lock import lock

Rows = Iterable[Mapping[str, Any]]
RowSets = Rows | Mapping[str, Rows]
PAD = 64  # few lengths, so that a compiling backend compiles few programs
REFUSED: Reasons = {
    "compute_loss_func": (None, "the loss is formed inside the backend's step; use TRL's trainer"),
    "optimizers": ((None, None), "the optimizer is the backend's; choose it by args.optim"),
    "optimizer_cls_and_kwargs": (None, "the optimizer is the backend's; choose it by args.optim"),
    "quantization_config": (None, "load the model with load_in_4bit=True"),
    "model_init": (None, "give the model itself"),
}


class BaseTrainer(TrainerSurface):
    """A trainer of a model's adapters. What it learns: `examples`, and `held_out` to evaluate on; train_dataset and
    eval_dataset show them as dicts.

    A trainer says which config it takes (rules, config), which arguments of its own it refuses or names in a warning, those of
    today's config that notebooks gave to the trainer (deprecated_args), how many examples make one sample (group_size), and
    which metrics its evaluations have without being asked (metrics).
    """

    rules: ClassVar[Rules]
    config: ClassVar[type[Any]]
    refused: ClassVar[Reasons] = REFUSED
    unused: ClassVar[Reasons] = {}
    deprecated_args: ClassVar[tuple[str, ...]] = ()
    group_size: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("loss", "num_tokens")

    examples: list[Example]
    held_out: Held | None
    compute_metrics: Callable[[Any], dict[str, float]] | None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None

    def __init__(self, model: Any, args: Any, processing_class: Any, peft_config: Any, others: Mapping[str, Any]) -> None:
        """Looks at all that came, but the data (`_begin`)."""
        refuse_overrides(self)
        self._check(others)
        self.base = ours(model, type(self).__name__)
        given = {name: others[name] for name in self.deprecated_args if others.get(name) is not None}
        self.args = self.rules.accept(args, self.config, given)
        check_precision(self.args, self.base.engine.model.options.dtype)
        if peft_config is not None:
            model = wrapped_by(model, peft_config)
        self.model: Any = model
        if self.args.gradient_checkpointing and self.base.engine.model.options.gradient_checkpointing == "none":
            set_checkpointing(model, "full")
        self.processing_class = processing_class or self.base.tokenizer
        self.max_length = self.args.max_length or self.base.max_seq_length
        self._devices = self.base.loaded.backend.devices()
        if self.args.use_cpu and self._devices.platform != "cpu":
            warn_once(f"use_cpu=True changes nothing: the model was loaded on {self._devices.name}")
        self._kept: Kept | None = None

    def _begin(self, train_dataset: Rows | None, eval_dataset: RowSets | None, callbacks: Sequence[Any] | None) -> None:
        """Reads the data, and tells the callbacks that the trainer is made."""
        if train_dataset is None:
            raise ValueError("train_dataset is needed")
        check_rows(train_dataset, "train_dataset")
        rows_a_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self._devices.count
        limit = rows_needed(train_dataset, self.args, rows_a_step)
        self._order = in_order if limit is not None else visiting_order(self.args)  # as transformers' samplers
        if self._evaluates() and eval_dataset is None:
            raise ValueError(f"eval_strategy is {self.args.eval_strategy}, and there is no eval_dataset; give one, or set 'no'")
        options = optimizer_options(self.args, "float32")
        scheduler_of(self.args, BackendOptimizer(options, self.args.learning_rate, {}), 10)
        held_out = None if eval_dataset is None else each(eval_dataset, "eval_dataset", self._encode)
        self.replace_examples(self._encode(train_dataset, "train_dataset", limit), held_out)
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_local_process_zero = self.state.is_world_process_zero = self._devices.rank == 0
        progress = PrinterCallback if self.args.disable_tqdm else ProgressCallback
        own = [DefaultFlowCallback, *get_reporting_integration_callbacks(self.args.report_to), *(callbacks or ())]
        if self._devices.rank == 0:
            own.append(progress)
        self.callback_handler: Any = LookingHandler(own, self.model, self.processing_class, None, None)
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    @classmethod
    def _check(cls, others: Mapping[str, Any]) -> None:
        known = {*cls.deprecated_args, *cls.refused, *cls.unused}
        unknown = {name: value for name, value in others.items() if name not in known}
        fields = {*cls.rules.known, *cls.rules.renamed, *cls.rules.former}
        elsewhere = {name: f"args={cls.rules.name}({name}=…)" for name in fields}
        refuse_unknown(cls.__name__, {*known, *cls.__init__.__annotations__} - {"return", "others"}, unknown, elsewhere)
        refuse_where_set(cls.__name__, others, cls.refused)
        warn_where_set(cls.__name__, others, cls.unused)

    def _check_best(self) -> None:
        """That evaluations will have metric_for_best_model, as far as their metrics are this trainer's own."""
        asked, theirs = self.args.metric_for_best_model, overridden(self, "evaluate") or self.callback_handler.adds_metrics()
        if asked is not None and self._evaluates() and self.compute_metrics is None and not theirs:
            check_best(
                asked, self.metrics, self.group_size == 2, list(self.held_out) if isinstance(self.held_out, dict) else []
            )

    def _evaluates(self) -> bool:
        return str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no" or self.args.eval_on_start

    def _encode(self, rows: Rows, name: str, limit: int | None = None) -> list[Example]:
        """Rows as examples, `group_size` of them a sample. limit: how many rows are read at most."""
        raise NotImplementedError

    def _make_step(self, options: OptimizerOptions) -> Step:
        raise NotImplementedError

    def _deciding(self) -> dict[str, Any]:
        """What decides a run's numbers beside its base and its data, for checkpoints to know."""
        return deciding(self.args)

    def measure(self, result: Any) -> Sequence[Metrics]:
        """What is logged of a step's result beside its loss: a dict a micro-batch."""
        del result
        return ()

    def _evaluate(self, held_out: list[Example], batches: Sequence[Batch]) -> dict[str, float]:
        """The metrics of held-out examples, "loss" among them."""
        raise NotImplementedError

    def _shown(self, examples: list[Example]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def replace_examples(self, examples: list[Example], held_out: Held | None) -> None:
        """Trains and evaluates on these from now on."""
        self.examples, self.held_out = examples, held_out

    def _take_collator(self, collator: Any) -> None:
        """That a collator is one that this trainer can do with; ValueError where not."""
        raise NotImplementedError

    @property
    def data_collator(self) -> Any:
        """As it was given: None where the trainer makes batches by itself."""
        return self._given_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        self._take_collator(collator)
        self._given_collator = collator

    @property
    def train_dataset(self) -> list[dict[str, Any]]:
        return self._shown(self.examples)

    @train_dataset.setter
    def train_dataset(self, rows: Rows) -> None:
        self.replace_examples(self._encode(rows, "train_dataset"), self.held_out)

    @property
    def eval_dataset(self) -> list[dict[str, Any]] | dict[str, list[dict[str, Any]]] | None:
        if isinstance(self.held_out, dict):
            return {name: self._shown(examples) for name, examples in self.held_out.items()}
        return None if self.held_out is None else self._shown(self.held_out)

    @eval_dataset.setter
    def eval_dataset(self, rows: RowSets | None) -> None:
        self.replace_examples(self.examples, None if rows is None else each(rows, "eval_dataset", self._encode))

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Sequence[str] | None = None,
        resume_anyway: Collection[str] = (),
    ) -> TrainOutput:
        """Trains what requires a gradient of the active adapter, up to args.max_steps or for args.num_train_epochs. A second
        call goes on with the moments of the first, as transformers' does, by the arguments as they are then (transformers also
        keeps the first call's rate, betas, decay and batch size).

        Args:
            resume_anyway: of "data", "base", "template", "recipe" (the arguments) and "files" (the checkpoint's own), what may
                have changed since the checkpoint that is gone on from was saved.

        Raises:
            ValueError: nothing to train (`SharedWeights`), a callback left another adapter active than train() began with, or
                another run saves to output_dir.
            CheckpointError: no checkpoint to resume from.
            NonFiniteLossError: a step's loss is NaN or infinite; the checkpoints before it stay.
        """
        anyway = check_kinds(resume_anyway, "resume_anyway")
        del ignore_keys_for_eval
        if trial is not None:
            raise ValueError(f"train() can't take a trial: {ABSENT['hyperparameter_search']}")
        refuse_overrides(self)
        self.callback_handler.check()
        check_wrappers(self.model, self.base)
        self._check_best()
        saves = self.args.save_strategy != "no" and self.state.is_world_process_zero
        with lock(Path(self.args.output_dir)) if saves else nullcontext():
            return self._train(checkpoint_to_resume(self.args, resume_from_checkpoint), anyway)

    def _train(self, resume: Path | None, anyway: Collection[str]) -> TrainOutput:
        self.model.train()
        options = optimizer_options(self.args, self.base.engine.model.options.dtype)
        weights = SharedWeights(self.base, options.name, self._kept)
        state = self.state
        state.global_step, state.epoch, state.log_history = 0, 0.0, []
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        model, backend, name = self.base.engine.model, self.base.loaded.backend, self.base.config.name_or_path or ""
        marks = fingerprints(
            self.base.loaded.checkpoint, self.processing_class, None, self.examples, all_of(self.held_out), self._deciding()
        )
        optimizer = BackendOptimizer(options, self.args.learning_rate, weights.held)
        self._run = TrainerRun(self, model, backend, weights, optimizer, self._step_batches(), name, marks, anyway)
        self.base.shared = self.callback_handler.weights = weights
        self.is_in_train = True
        try:
            weights.begin(lambda: self._make_step(replace(options, max_grad_norm=max_norm(self.args))))
            done = TrainOutput(*self._run.train(resume))
            self._kept = weights.end()
            return done
        except BaseException:
            self._kept = weights.rescue()
            raise
        finally:
            self.base.shared = self.callback_handler.weights = None
            self.is_in_train = False

    def _step_batches(self, stream: Callable[..., StepBatches] = StepBatches) -> StepBatches:
        args = self.args
        check_length(longest(self.examples), self.base.engine.model.spec.max_positions)
        return stream(
            self.examples,
            batch_size=args.per_device_train_batch_size * self._devices.count * self.group_size,
            accumulation=args.gradient_accumulation_steps,
            seed=args.seed,
            shuffle=True,
            packing=getattr(args, "packing", False),
            max_length=max(self.max_length, longest(self.examples)),
            pad_to_multiple_of=args.pad_to_multiple_of if isinstance(args.pad_to_multiple_of, int) else PAD,
            devices=self._devices.count,
            order=self._order,
            group_size=self.group_size,
        )

    def evaluate(
        self,
        eval_dataset: RowSets | str | None = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The held-out loss and the trainer's other metrics; logged, and told to the callbacks. Of several data sets one after
        the other, as ``eval_NAME_loss`` (TRL's own metrics stay ``eval_…``); eval_dataset may name one of the trainer's."""
        several = self.held_out if eval_dataset is None else eval_dataset
        if isinstance(several, Mapping):
            metrics: dict[str, float] = {}
            for name, rows in several.items():
                own = name if eval_dataset is None else rows
                metrics |= self.evaluate(own, ignore_keys, f"{metric_key_prefix}_{name}")  # type: ignore[arg-type]
            return metrics
        held_out = one_of(self.held_out, eval_dataset, self._encode)
        metrics = self._measured(held_out, metric_key_prefix, "eval", predicts=self.compute_metrics is not None)[0]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Rows, ignore_keys: Sequence[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The logits of every row through the module, its labels, and the metrics that `evaluate` would find."""
        del ignore_keys
        examples = self._encode(test_dataset, "test_dataset")
        metrics, seen = self._measured(examples, metric_key_prefix, metric_key_prefix, not self.args.prediction_loss_only)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        if seen is None:
            return PredictionOutput(None, None, metrics)  # type: ignore[arg-type]
        return PredictionOutput(seen.predictions, seen.label_ids, metrics)

    def _measured(
        self, examples: list[Example], prefix: str, own: str, predicts: bool
    ) -> tuple[dict[str, float], EvalPrediction | None]:
        """(the metrics of examples, what compute_metrics was given: None where it does not predict). own: the prefix of the
        trainer's metrics beside the loss."""
        push_for_inference(self.base)
        start = time.perf_counter()
        batches = self._eval_batches(examples, self._eval_rows())
        found = self._evaluate(examples, batches)
        if asks_for_logits(self.args.metric_for_best_model, pairs=self.group_size == 2):
            found |= token_metrics(self.model, batches, pairs=self.group_size == 2)
        seen = predictions(self.model, batches, self.preprocess_logits_for_metrics) if predicts else None
        metrics = {f"{prefix if name == 'loss' else own}_{name}": value for name, value in found.items()}
        if self.compute_metrics is not None and seen is not None:
            asked = self.compute_metrics(seen).items()
            metrics |= {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in asked}
        seconds = time.perf_counter() - start
        metrics[f"{prefix}_runtime"] = round(seconds, 4)
        metrics[f"{prefix}_samples_per_second"] = round(len(examples) / self.group_size / seconds, 3)
        metrics[f"{prefix}_steps_per_second"] = round(len(batches) / seconds, 3)
        return metrics, seen

    def _eval_rows(self) -> int:
        """Of a batch, on all devices."""
        return self.args.per_device_eval_batch_size * self._devices.count * self.group_size

    def get_train_dataloader(self) -> Batches:
        """The batches of the first epoch, as the backend gets them; in DPO rows 2i and 2i + 1 are a pair."""
        step_batches = self._step_batches()
        made = cache(step_batches.batch)

        def make(index: int) -> Batch:
            step, micro = divmod(index, step_batches.accumulation)
            return made(step).micro(micro)

        return Batches(step_batches.batches_per_epoch, make, self.train_dataset, step_batches.batch_size)

    def get_eval_dataloader(self, eval_dataset: Rows | str | None = None) -> Batches:
        held_out = one_of(self.held_out, eval_dataset, self._encode)
        batches = self._eval_batches(held_out, self._eval_rows())
        return Batches(len(batches), batches.__getitem__, self._shown(held_out), self._eval_rows())

    def get_test_dataloader(self, test_dataset: Rows) -> Batches:
        return self.get_eval_dataloader(test_dataset)

    def _eval_batches(self, held_out: list[Example], size: int) -> list[Batch]:
        return eval_batches(held_out, size, PAD, longest(held_out), self._devices.count)


def ours(model: Any, trainer: str) -> FastModelForCausalLM:
    """The base under the model's adapters; TypeError where it is none of ours."""
    base = base_of(model)
    if not isinstance(base, FastModelForCausalLM):
        raise TypeError(
            f"this trainer trains models of FastLanguageModel.from_pretrained, got {type(base).__name__}; "
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
            f"data_collator must be one of {', '.join(allowed)}, got {name}: batches are made by this trainer. {advice}"
        )


def longest(examples: Sequence[Example]) -> int:
    return max(len(example.tokens) for example in examples)


def real_rows(batch: Batch) -> int:
    """How many rows of a batch don't only fill its shape."""
    return int(np.count_nonzero(batch.rows != FILLER_ROW))
