"""What scripts ask of a transformers Trainer beside training: how it is here, or an error that says why it isn't."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, trainer_pt_utils

from jaxsloth.batch import Batch
from jaxsloth.frontend.adapters import base_of
from jaxsloth.frontend.metrics import module_inputs
from jaxsloth.frontend.saving import upload
from jaxsloth.frontend.shared_weights import ELSEWHERE

_LOSS = "the loss and its gradients are formed inside the backend's step"
_OPTIMIZER = "the optimizer is the backend's; args choose it (optim, learning_rate, …), and trainer.optimizer shows it"
_DATA = "batches are made from tokens in memory; get_train_dataloader() shows them"
_EVALUATION = "evaluate() and predict() run the backend's own passes; compute_metrics is called with their logits"
_SEARCH = "make a model and a trainer for each trial"
_DEVICES = "accelerate takes no part: data parallel training runs by torchrun, or on all devices that JAX sees"
# Names of transformers' and TRL's trainers that are not here -> why.
ABSENT: dict[str, str] = {
    **dict.fromkeys(("compute_loss", "training_step", "compute_loss_context_manager", "autocast_smart_context_manager"), _LOSS),
    **dict.fromkeys(("compute_loss_func", "loss_is_scaled_for_ga", "label_smoother", "get_batch_samples"), _LOSS),
    **dict.fromkeys(("create_optimizer", "create_scheduler", "create_optimizer_and_scheduler"), _OPTIMIZER),
    **dict.fromkeys(("get_optimizer_cls_and_kwargs", "optimizer_cls_and_kwargs", "get_optimizer_group"), _OPTIMIZER),
    "get_decay_parameter_names": _OPTIMIZER,
    **dict.fromkeys(("set_initial_training_values", "compute_ref_log_probs"), _DATA),
    **dict.fromkeys(("prediction_step", "evaluation_loop", "gather_function"), _EVALUATION),
    **dict.fromkeys(("hyperparameter_search", "call_model_init", "model_init"), _SEARCH),
    **dict.fromkeys(("accelerator", "create_accelerator_and_postprocess", "end"), _DEVICES),
    **dict.fromkeys(("floating_point_ops", "store_flos", "current_flos"), "floating point operations are not counted"),
    "init_hf_repo": "push_to_hub() makes the repository",
}
# What a subclass may have of its own: it is called, or transformers itself does no more with it.
_CALLED = {
    *("train", "evaluate", "predict", "log", "save_model", "save_state", "push_to_hub", "create_model_card"),
    *("add_callback", "pop_callback", "remove_callback", "is_world_process_zero", "is_local_process_zero"),
    *("log_metrics", "save_metrics", "metrics_format", "get_num_trainable_parameters", "get_learning_rates"),
}
# What a trainer has to be read, and nobody gives it.
_READ = {"optimizer", "lr_scheduler"}
# Models, which stay those that a trainer was made with.
_MADE_WITH = ("model", "ref_model")
# What TRL's trainers read of themselves at every step, having taken it from args.
_OF_ARGS = frozenset(
    {
        *("beta", "label_smoothing", "loss_types", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha"),
        *("use_weighting", "precompute_ref_logps", "padding_free", "completion_only_loss", "chat_template"),
        *("aux_loss_enabled", "router_aux_loss_coef"),
    }
)
# Of TRL's trainers, which need not be installed, beside transformers'.
_OF_TRL = {
    *("_prepare_dataset", "_prepare_model_for_training", "_create_model_from_path", "_precompute_ref_logps"),
    *("_compute_loss", "_compute_loss_liger", "_get_per_token_logps_and_entropies", "compute_ref_log_probs"),
    *("compute_reference_log_probs", "concatenated_forward", "dpo_loss", "get_batch_loss_metrics", "concatenated_inputs"),
    *("_reject_skip_prepare_without_labels", "_send_telemetry"),
}
# What those of transformers 4 and TRL 0.x called besides.
_ONCE = {
    *("prediction_loop", "tokenize_row", "process_row", "build_tokenized_answer", "get_batch_logps", "store_metrics"),
    *("generate_from_model_and_ref", "null_ref_context", "_prepare_non_packed_dataloader", "_prepare_packed_dataloader"),
    *("_prepare_peft_model", "_prepare_gradient_checkpointing", "_activate_neftune", "_trl_activate_neftune"),
    *("_deactivate_neftune", "_rotate_checkpoints", "_align_special_tokens", "ipex_optimize_model", "torch_jit_model_eval"),
}


class NotHereError(AttributeError):
    """A name of transformers' or TRL's trainers that this trainer has not; `hasattr` says so too."""


@cache
def _theirs() -> frozenset[str]:
    return frozenset((set(dir(Trainer)) - set(dir(object))) | set(ABSENT) | _READ | _OF_TRL | _ONCE)


def refuse_overrides(trainer: Any) -> None:
    """ValueError for a method of transformers' Trainer that a subclass, or the object itself, has as its own and that would
    never be called."""
    refuse_settings(trainer)
    own = {name for name, value in vars(trainer).items() if value is not None and (name in ABSENT or callable(value))}
    for kind in type(trainer).__mro__:
        if kind.__module__.partition(".")[0] not in ("jaxsloth", "builtins"):
            own |= {name for name, value in vars(kind).items() if callable(value) or isinstance(value, (property, classmethod))}
    uncalled = sorted(name for name in own & _theirs() - _CALLED if not name.startswith("__"))
    if uncalled:
        raise ValueError(
            f"{type(trainer).__name__} has its own {', '.join(uncalled)}, which would never be called: steps, batches and "
            f"evaluations are the backend's. Derive it from TRL's trainer of the same name instead: {ELSEWHERE}. Called are: "
            f"{', '.join(sorted(_CALLED))}"
        )


def overridden(trainer: Any, method: str) -> bool:
    """Whether a method is the user's own."""
    return getattr(trainer, method).__module__.partition(".")[0] != __name__.partition(".")[0]


def refuse_settings(trainer: Any) -> None:
    """ValueError for what was set on a trainer of ours and acts on one of TRL's alone."""
    if not _OF_ARGS.isdisjoint(vars(trainer)):
        name = min(_OF_ARGS.intersection(vars(trainer)))
        raise ValueError(
            f"{type(trainer).__name__}.{name} was set, and would have no effect: args chose what the loss is made of when the "
            f"trainer was made. {ELSEWHERE}"
        )


class Batches:
    """A trainer's batches as dicts of tensors, in transformers' terms, made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Batch], dataset: Any, batch_size: int) -> None:
        self._count, self._make, self.dataset, self.batch_size = count, make, dataset, batch_size

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in range(self._count):
            yield module_inputs(self._make(index))


class TrainerSurface:
    """A mixin of `BaseTrainer`."""

    args: Any
    model: Any
    state: Any
    control: Any
    processing_class: Any
    callback_handler: Any
    is_in_train = is_model_parallel = is_deepspeed_enabled = is_fsdp_enabled = is_fsdp_xla_enabled = False
    label_names = ("labels",)
    _devices: Any
    _run: Any

    # transformers' own functions, which ask a trainer for its args, its state, its model and is_world_process_zero.
    log_metrics = trainer_pt_utils.log_metrics
    save_metrics = trainer_pt_utils.save_metrics
    save_state = trainer_pt_utils.save_state
    metrics_format = trainer_pt_utils.metrics_format
    get_num_trainable_parameters = trainer_pt_utils.get_num_trainable_parameters

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self)
        if name in _MADE_WITH and name in own and base_of(value) is not base_of(own[name]):
            raise ValueError(
                f"trainer.{name} can't be replaced by another model: the trainer's optimizer, data and reference "
                "belong to the one that it was made with; make a new trainer"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        own = type(self).__name__
        if name in _theirs():
            why = f": {ABSENT[name]}" if name in ABSENT else ""
            raise NotHereError(f"{own} has no {name}{why}; {ELSEWHERE}")
        raise AttributeError(f"{own!r} object has no attribute {name!r}")

    @property
    def tokenizer(self) -> Any:
        return self.processing_class

    @property
    def model_wrapped(self) -> Any:
        return self.model

    @property
    def hub_model_id(self) -> str:
        """Where push_to_hub() goes."""
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    @property
    def optimizer(self) -> Any:
        """Of the run at hand or the last one (`BackendOptimizer`); None before the first, as in transformers."""
        return self._run.optimizer if "_run" in vars(self) else None

    @optimizer.setter
    def optimizer(self, value: Any) -> None:
        raise ValueError(f"trainer.optimizer can't be set: {_OPTIMIZER}")

    @property
    def lr_scheduler(self) -> Any:
        """That of `optimizer`."""
        return self._run.scheduler if "_run" in vars(self) else None

    @lr_scheduler.setter
    def lr_scheduler(self, value: Any) -> None:
        raise ValueError(f"trainer.lr_scheduler can't be set: {_OPTIMIZER}")

    def get_learning_rates(self) -> list[float]:
        """Each group's rate, of the step that comes next."""
        if self.optimizer is None:
            raise ValueError("the learning rate depends on the run; call train() first, or ask in a callback")
        return [group["lr"] for group in self.optimizer.param_groups]

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        return self._devices.rank == 0

    def is_local_process_zero(self) -> bool:
        return int(os.environ.get("LOCAL_RANK") or self._devices.rank) == 0

    def num_examples(self, dataloader: Any) -> int:
        return len(dataloader.dataset)

    def get_total_train_batch_size(self, args: Any) -> int:
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self._devices.count

    def get_tp_size(self) -> int:
        return 1

    def get_cp_size(self) -> int:
        return 1

    def get_sp_size(self) -> int:
        return 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the history, and tells the callbacks."""
        del start_time
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.is_in_train and self.args.include_num_input_tokens_seen != "no":
            logs |= self._run.tokens_seen()
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """The adapter as PEFT saves it, and the tokenizer. A subclass' own is also called at every checkpoint, whose adapter
        is written before."""
        if self.is_world_process_zero():
            folder = str(output_dir or self.args.output_dir)
            self.model.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def saves_itself(self) -> bool:
        """Whether a subclass has a save_model of its own."""
        return type(self).save_model is not TrainerSurface.save_model or "save_model" in vars(self)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """README.md in args.output_dir: PEFT's card, with these names."""
        from huggingface_hub import ModelCard

        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.create_or_update_model_card(str(folder))
        card: Any = ModelCard.load(folder / "README.md")
        given = [tags] if isinstance(tags, str) else list(tags or ())
        card.data.tags = sorted({*(card.data.tags or ()), *given, "jaxsloth"})
        if model_name is not None:
            card.data.model_name = model_name
        if dataset_name is not None:
            card.data.datasets = [dataset_name]
        card.save(folder / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Saves the adapter and its card in args.output_dir, and uploads that without its checkpoints to `hub_model_id`. card:
        `create_model_card`'s arguments."""
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.rpartition("/")[2], **card})
        return upload(
            Path(self.args.output_dir),
            self.hub_model_id,
            token or self.args.hub_token,
            self.args.hub_private_repo if private is None else private,
            commit_message or "Upload model",
            revision or self.args.hub_revision,
            run_as_future=not blocking,
            ignore_patterns=["_*", "checkpoint-*"],
        )
