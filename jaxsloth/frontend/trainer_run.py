"""A run of a native trainer: transformers' events and decisions as a flow around the training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from safetensors.numpy import save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from jaxsloth.backend import Backend, Model, Step
from jaxsloth.batch import StepBatch
from jaxsloth.convert.files import whole_folder
from jaxsloth.convert.peft_adapter import check_values, read_adapter, stored, write_adapter_files
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.step_batches import StepBatches
from jaxsloth.foreign import Count, Schema, read_object, validated
from jaxsloth.frontend.arguments import warn_once
from jaxsloth.frontend.optimizer_view import OPTIMIZERS, BackendOptimizer, go_on_from, scheduler_of
from jaxsloth.frontend.shared_weights import SharedWeights
from jaxsloth.frontend.trainer_surface import overridden, refuse_settings
from jaxsloth.models.names import trainable_shapes
from jaxsloth.training.checkpoint import (
    STATE,
    TRAINER_STATE,
    check_lora,
    check_saved,
    prune,
    read_optimizer,
    refuse_links,
    steps_saved,
)
from jaxsloth.training.fingerprints import Fingerprints, check_fingerprints
from jaxsloth.training.loop import Dispatched, Loop

_SAVE_BEST = "best"


def in_order(count: int, *, epoch: int) -> np.ndarray:
    """Every epoch visits the rows as they stand."""
    del epoch
    return np.arange(count, dtype=np.int64)


def visiting_order(args: Any) -> Callable[..., np.ndarray]:
    """The order of rows that transformers' Trainer has under accelerate: torch's permutation of data_seed + epoch.

    Raises:
        ValueError: a train_sampling_strategy that is neither random nor sequential.
    """
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        raise ValueError(f"train_sampling_strategy must be 'random' or 'sequential', got {strategy!r}")
    seed = args.seed if args.data_seed is None else args.data_seed

    if strategy == "sequential":
        return in_order

    def visit(count: int, *, epoch: int) -> np.ndarray:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).numpy()

    return visit


Metrics = Mapping[str, float]


def means(metrics: Sequence[Metrics]) -> dict[str, float]:
    """Each metric's mean over the batches that it was measured on, as TRL logs it."""
    names = dict.fromkeys(name for found in metrics for name in found)
    return {name: float(np.mean([found[name] for found in metrics if name in found])) for name in names}


class SavedState(Schema):
    """What a run that goes on takes from transformers' trainer_state.json."""

    global_step: Count
    epoch: float | None = None
    log_history: list[dict[str, Any]] = Field(default_factory=list)
    best_metric: float | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: str | None = None
    num_input_tokens_seen: Count = 0


# Arguments that decide a run's numbers, beside what becomes of the data and of the adapter; how many steps it has may change,
# as scripts go on with more of them.
DECIDING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "seed", "data_seed", "train_sampling_strategy", "optim", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "packing"),
    *("beta", "loss_type", "label_smoothing", "disable_dropout", "embedding_learning_rate"),
)


def deciding(args: Any) -> dict[str, Any]:
    """The arguments that decide a run's numbers, as plain values."""
    values = {name: getattr(args, name, None) for name in DECIDING}
    plain = {name: getattr(value, "value", value) for name, value in values.items() if value is not None}
    return plain | {"optim": OPTIMIZERS.get(str(plain.get("optim")), plain.get("optim"))}


class Owner(Protocol):
    """The trainer whose run it is; a subclass' own `log`, `evaluate` and `save_model` are called."""

    args: Any
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    processing_class: Any

    @property
    def held_out(self) -> Any: ...

    def evaluate(self) -> Metrics: ...

    def log(self, logs: dict[str, float]) -> None: ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...

    def saves_itself(self) -> bool: ...

    def measure(self, result: Any) -> Sequence[Metrics]:
        """What is logged of a step's result beside its loss: a dict a micro-batch."""
        ...


@dataclass
class TrainerRun:
    """One `train()`, a `training.loop.Flow`. weights: what is trained, and the step that trains it; optimizer: how it steps, as
    callbacks see it; base_model: what checkpoints call the base."""

    owner: Owner
    model: Model
    backend: Backend
    weights: SharedWeights
    optimizer: BackendOptimizer
    step_batches: StepBatches
    base_model: str
    fingerprints: Fingerprints
    resume_anyway: Collection[str] = ()
    _begun: tuple[float, int] = (0.0, 0)
    _all_losses: float = 0.0
    _logged: int = 0
    _in_epoch: bool = False
    _max_norm: float | None = None
    scheduler: LambdaLR = field(init=False)

    @property
    def args(self) -> Any:
        return self.owner.args

    @property
    def state(self) -> TrainerState:
        return self.owner.state

    @property
    def output(self) -> Path:
        return Path(self.args.output_dir)

    def train(self, resume: Path | None) -> tuple[int, float, dict[str, float]]:
        """(steps done, mean loss, metrics), as transformers' TrainOutput has them."""
        args, state, per_epoch = self.args, self.state, self.step_batches.steps_per_epoch
        state.max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        state.num_train_epochs = math.ceil(state.max_steps / per_epoch)
        state.compute_steps(args, state.max_steps)
        self.scheduler = scheduler_of(args, self.optimizer, state.max_steps)
        handler: Any = self.owner.callback_handler
        handler.optimizer, handler.lr_scheduler, self._max_norm = self.optimizer, self.scheduler, args.max_grad_norm
        if resume is not None:
            self._resume(resume)
        first, start = state.global_step, time.perf_counter()
        self._logged, self._begun = first, (start, state.num_input_tokens_seen)
        self._emit("on_train_begin")
        if args.eval_on_start and self.owner.held_out:
            self._evaluate()  # as in transformers, it is no candidate for the best
        loop = Loop(self, args.seed)
        loop.run(first)
        self._all_losses += sum(item.loss for item in loop.unlogged if math.isfinite(item.loss))
        self._load_best()
        done, seconds = state.global_step - first, time.perf_counter() - start
        loss = self._all_losses / max(done, 1)
        samples = (
            sum(len(self.step_batches.rows_of(step)) for step in range(first, state.global_step))
            // self.step_batches.group_size
        )
        metrics = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(samples / seconds, 3),
            "train_steps_per_second": round(done / seconds, 3),
            "train_tokens": float(state.num_input_tokens_seen),
            "train_loss": loss,
        }
        self._log(metrics)
        self._emit("on_train_end")
        return state.global_step, loss, metrics | {"epoch": state.epoch or 0.0}

    def prepare(self, step: int) -> tuple[Step, StepBatch, float] | None:
        control = self.owner.control
        if not self._in_epoch:
            if step >= self.state.max_steps or control.should_training_stop:
                return None
            self._emit("on_epoch_begin")
            self._in_epoch = True
        self._emit("on_step_begin")
        step_batch = self.step_batches.batch(step)
        for _ in range(len(step_batch.input_ids) - 1):
            self._emit("on_substep_end")
        self._emit("on_pre_optimizer_step")
        self.weights.to_backend()
        refuse_settings(self.owner)
        if self.args.max_grad_norm != self._max_norm:  # it counts at every step, as in transformers
            self._max_norm = self.args.max_grad_norm
            self.weights.renew()
        return self.weights.step, step_batch, self.optimizer.rate()

    def stepped(self, item: Dispatched) -> Iterator[None]:
        state, per_epoch = self.state, self.step_batches.steps_per_epoch
        self.weights.stepped()
        self._emit("on_optimizer_step")
        self.scheduler.step()
        state.global_step, state.epoch = item.step, self._epochs(item.step)
        state.num_input_tokens_seen += item.tokens
        self._emit("on_step_end")
        yield
        control = self.owner.control
        if item.step % per_epoch == 0 or control.should_epoch_stop or control.should_training_stop:
            self._in_epoch = False
            self._emit("on_epoch_end")
            yield

    @property
    def logs(self) -> bool:
        return self.owner.control.should_log and self.state.global_step > self._logged

    @property
    def evaluates(self) -> bool:
        return self.owner.control.should_evaluate and bool(self.owner.held_out)

    @property
    def saves(self) -> bool:
        return self.owner.control.should_save

    def _epochs(self, steps: int) -> float:
        """How many epochs these steps are, counted in micro-batches, as transformers does."""
        whole, rest = divmod(steps, self.step_batches.steps_per_epoch)
        return whole + rest * self.step_batches.accumulation / self.step_batches.batches_per_epoch

    def log(self, items: Sequence[Dispatched]) -> None:
        losses = [item.loss for item in items if math.isfinite(item.loss)]  # of a step that fp16 skipped it may not be
        self._all_losses += sum(losses)
        own = {
            "loss": float(np.mean(losses)) if losses else math.nan,
            "grad_norm": items[-1].grad_norm,
            "learning_rate": items[-1].rate,
        }
        measured = [metrics for item in items for metrics in self.owner.measure(item.result)]
        self._logged = self.state.global_step
        self._log(own | means(measured) | {"num_tokens": float(self.state.num_input_tokens_seen)})

    def evaluate(self) -> None:
        improved = self._update_best(self._evaluate())
        if self.args.save_strategy == _SAVE_BEST:
            self.owner.control.should_save = improved

    def save(self) -> None:
        self._save()
        self._emit("on_save")

    def _log(self, logs: dict[str, float]) -> None:
        self._show_to("log")
        self.owner.log(logs)

    def _evaluate(self) -> Metrics:
        self._show_to("evaluate")
        return self.owner.evaluate()

    def _show_to(self, method: str) -> None:
        """Brings the module up to date for a subclass' own method, which may look at weights."""
        if overridden(self.owner, method):
            self.weights.to_module()

    def _update_best(self, metrics: Metrics) -> bool:
        """Whether the metric that args names is the best so far; KeyError lists the metrics that there are."""
        name = self.args.metric_for_best_model
        if name is None:
            return False
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in metrics:
            raise KeyError(f"metric_for_best_model is {name!r}, and the evaluation has: {', '.join(metrics)}")
        best, value = self.state.best_metric, metrics[key]
        improved = best is None or (value > best if self.args.greater_is_better else value < best)
        if improved:
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        return improved

    def _save(self) -> None:
        state = self.state
        if state.best_global_step:
            best = self.output / f"checkpoint-{state.best_global_step}"
            if state.best_global_step == state.global_step or best.is_dir():
                state.best_model_checkpoint = str(best)
        self.weights.to_backend()
        optimizer = self.weights.step.state() if not self.args.save_only_model else {}
        if state.is_world_process_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            with whole_folder(self.output / f"checkpoint-{state.global_step}", overwrite=True) as folder:
                adapter = self.model.trainable()
                write_adapter_files(folder, self.model.spec, adapter, self.base_model)
                parts = {"adapter": stored(adapter)}
                if optimizer:
                    parts["optimizer"] = {name: np.asarray(value) for name, value in optimizer.items()}
                    save_file(parts["optimizer"], folder / STATE)
                state.save_to_json(str(folder / TRAINER_STATE))
                self.owner.processing_class.save_pretrained(str(folder))
                if self.owner.saves_itself():
                    self.weights.to_module()
                    self.owner.save_model(str(folder), _internal_call=True)
                    parts["adapter"] = read_adapter(folder)[1]
                self.fingerprints.write(folder, parts)
            if self.args.save_total_limit:
                prune(self.output, self.args.save_total_limit, state.best_global_step)
        self.backend.barrier()

    def _load_best(self) -> None:
        """The weights of the best checkpoint, where args ask for it."""
        if not self.args.load_best_model_at_end:
            return
        folder = self.state.best_model_checkpoint
        if folder is None or not Path(folder).is_dir():
            why = "has no checkpoint" if folder is None else f"had its checkpoint in {folder}, which is gone"
            warn_once(f"load_best_model_at_end: the best evaluation {why}; the weights stay the last step's")
            return
        self.weights.to_backend()
        self.model.load_trainable(read_adapter(Path(folder))[1])
        self.weights.stepped()

    def _resume(self, folder: Path) -> None:
        if not (folder / STATE).is_file():
            raise CheckpointError(f"{folder} holds no {STATE} (save_only_model?), so the run can't go on from it")
        refuse_links(folder.parent)
        (config, adapter), optimizer, file = read_adapter(folder), read_optimizer(folder), folder / TRAINER_STATE
        saved = validated(SavedState, read_object(file, CheckpointError), file, CheckpointError)
        check_saved(folder, saved.global_step, config, adapter, optimizer)
        check_lora(folder, config, self.model.spec)
        check_values(adapter, trainable_shapes(self.model.spec), str(folder))
        parts, how = {"adapter": adapter, "optimizer": optimizer}, "train(…, resume_anyway=[{kind!r}])"
        check_fingerprints(folder, self.fingerprints, parts, self.resume_anyway, how)
        self.model.load_trainable(adapter)
        self.weights.stepped()
        self.weights.step.load_state(optimizer)
        go_on_from(self.scheduler, saved.global_step)
        for name in SavedState.model_fields:
            setattr(self.state, name, getattr(saved, name))
        best = self.state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            warn_once(f"the best checkpoint of the resumed run, {best}, is gone; it is no candidate for the best any more")
            self.state.best_model_checkpoint = None

    def tokens_seen(self) -> dict[str, float]:
        """What include_num_input_tokens_seen adds to a log."""
        (start, before), seen = self._begun, self.state.num_input_tokens_seen
        speed = round((seen - before) / (time.perf_counter() - start), 3)
        return {"num_input_tokens_seen": seen, "train_tokens_per_second": speed}

    def _emit(self, event: str) -> None:
        handler: Any = self.owner.callback_handler
        self.owner.control = getattr(handler, event)(self.args, self.state, self.owner.control)


def checkpoint_to_resume(args: Any, asked: bool | str | None) -> Path | None:
    """The folder that ``resume_from_checkpoint`` names, or output_dir's newest checkpoint where it is True.

    Raises:
        CheckpointError: there is none.
    """
    if not asked:
        return None
    if asked is not True:
        folder = Path(asked)
        if not (folder / TRAINER_STATE).is_file():
            raise CheckpointError(f"resume_from_checkpoint: {folder} holds no {TRAINER_STATE}")
        return folder
    saved: Sequence[int] = steps_saved(Path(args.output_dir))
    if not saved:
        raise CheckpointError(f"resume_from_checkpoint=True, and {args.output_dir} holds no checkpoint")
    return Path(args.output_dir) / f"checkpoint-{saved[-1]}"
