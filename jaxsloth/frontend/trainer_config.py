"""What every native trainer's arguments share: transformers' TrainingArguments, and what becomes of each field."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from jaxsloth.frontend.argument_values import TrainerValues, check_values
from jaxsloth.frontend.arguments import refuse_unknown, refuse_where_set, warn_once, warn_renamed, warn_where_set

Reasons = dict[str, tuple[Any, str]]

# Every field of transformers' TrainingArguments stands in one of these three, or in a trainer's own; a test walks them.
USED = {
    *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
    *("activation_checkpointing", "gradient_checkpointing", "logging_strategy", "logging_steps", "logging_first_step"),
    *("disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "prediction_loss_only"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "seed", "data_seed", "train_sampling_strategy"),
    *("include_num_input_tokens_seen", "use_cpu"),
}
REFUSED: Reasons = {
    "optim_target_modules": (None, "it belongs to optimizers that are not here"),
    "optim_args": (None, "it belongs to optimizers that are not here"),
    "deepspeed": (None, "data parallel training runs by torchrun, or on all devices that JAX sees"),
    "fsdp": (None, "data parallel training runs by torchrun, or on all devices that JAX sees"),
    "parallelism_config": (None, "data parallel training runs by torchrun, or on all devices that JAX sees"),
    "auto_find_batch_size": (False, "a batch that does not fit fails; give a smaller one and more accumulation"),
    "batch_eval_metrics": (False, "compute_metrics gets all rows at once"),
    "include_for_metrics": ([], "compute_metrics gets predictions and labels"),
    "dataloader_drop_last": (False, "the last step of an epoch takes the rows that are left"),
    "push_to_hub": (False, "call push_to_hub or push_to_hub_merged when the training is done"),
    "group_by_length": (False, "rows are visited at random, or in order (train_sampling_strategy='sequential')"),
    "adafactor": (False, "there is no Adafactor here; write optim='adamw_torch' or optim='adamw_8bit'"),
    "sharded_ddp": ("", "data parallel training runs by torchrun, or on all devices that JAX sees"),
    "fsdp_min_num_params": (0, "data parallel training runs by torchrun, or on all devices that JAX sees"),
    "fsdp_transformer_layer_cls_to_wrap": (None, "data parallel training runs by torchrun, or on all devices that JAX sees"),
    "include_inputs_for_metrics": (False, "compute_metrics gets predictions and labels"),
    "past_index": (-1, "no state is carried from one row to the next"),
    "push_to_hub_organization": (None, "write it before the name: hub_model_id='organization/name'"),
}
UNUSED: Reasons = {
    "average_tokens_across_devices": (True, "the loss is always the mean over all devices"),
    "bf16_full_eval": (False, "evaluation is in the model's dtype"),
    "fp16_full_eval": (False, "evaluation is in the model's dtype"),
    "tf32": (None, "float32 is true float32"),
    "activation_checkpointing_kwargs": (None, "backends recompute in their own way"),
    "gradient_checkpointing_kwargs": (None, "backends recompute in their own way"),
    "torch_compile": (False, "each backend compiles what it compiles"),
    "torch_compile_backend": (None, "each backend compiles what it compiles"),
    "torch_compile_mode": (None, "each backend compiles what it compiles"),
    "use_liger_kernel": (False, "the backends have kernels of their own"),
    "liger_kernel_config": (None, "the backends have kernels of their own"),
    "use_cache": (False, "training caches no keys"),
    "torch_empty_cache_steps": (None, "memory is not handed back while training"),
    "log_on_each_node": (True, "the first process logs"),
    "logging_nan_inf_filter": (True, "a loss that is not finite ends the run"),
    "log_level": ("passive", "use Python's logging"),
    "log_level_replica": ("warning", "use Python's logging"),
    "eval_do_concat_batches": (True, "batches are joined"),
    "eval_use_gather_object": (False, "losses are summed"),
    "eval_accumulation_steps": (None, "only sums stay on the device"),
    "save_on_each_node": (False, "the first process saves"),
    "enable_jit_checkpoint": (False, "checkpoints are written at their steps"),
    "hub_token": (None, "nothing is pushed while training"),
    "hub_private_repo": (None, "nothing is pushed while training"),
    "hub_model_id": (None, "nothing is pushed while training"),
    "hub_strategy": ("every_save", "nothing is pushed while training"),
    "hub_always_push": (False, "nothing is pushed while training"),
    "hub_revision": (None, "nothing is pushed while training"),
    "ignore_data_skip": (False, "a resumed run goes on at its step at once"),
    "restore_callback_states_from_checkpoint": (False, "callbacks begin anew"),
    "full_determinism": (False, "runs are deterministic as far as their kernels are"),
    "accelerator_config": (None, "accelerate takes no part"),
    "dataloader_num_workers": (0, "rows are tokens in memory"),
    "dataloader_pin_memory": (True, "rows are tokens in memory"),
    "dataloader_persistent_workers": (False, "rows are tokens in memory"),
    "dataloader_prefetch_factor": (None, "rows are tokens in memory"),
    "dataloader_multiprocessing_context": (None, "rows are tokens in memory"),
    "dataloader_in_order": (True, "rows are tokens in memory"),
    "remove_unused_columns": (True, "only the columns that are read count"),
    "label_names": (None, "rows are prepared by what they hold"),
    "length_column_name": ("length", "lengths are counted"),
    "ddp_find_unused_parameters": (None, "one buffer of all gradients is reduced"),
    "ddp_bucket_cap_mb": (None, "one buffer of all gradients is reduced"),
    "ddp_broadcast_buffers": (None, "one buffer of all gradients is reduced"),
    "ddp_static_graph": (None, "one buffer of all gradients is reduced"),
    "ddp_backend": (None, "NCCL on GPUs, gloo on CPUs"),
    "ddp_timeout": (1800, "torchrun's counts"),
    "fsdp_config": (None, "it belongs to fsdp"),
    "debug": ([], "nothing is instrumented"),
    "skip_memory_metrics": (True, "ask jaxsloth.memory_stats()"),
    "do_train": (False, "call train()"),
    "do_eval": (False, "call evaluate(), or set eval_strategy"),
    "do_predict": (False, "call evaluate()"),
    "resume_from_checkpoint": (None, "give it to train()"),
    "local_rank": (-1, "torchrun's environment counts"),
    "overwrite_output_dir": (False, "checkpoints of the same step are replaced in any case"),
    "logging_dir": (None, "set TENSORBOARD_LOGGING_DIR"),
    "save_safetensors": (True, "only safetensors are written"),
    "fp16_backend": ("auto", "the model's own dtype counts; load it in that dtype"),
    "half_precision_backend": ("auto", "the model's own dtype counts; load it in that dtype"),
    "fp16_opt_level": ("O1", "it was Apex's; the model's own dtype counts"),
    "use_mps_device": (False, "the backend runs on the device that it sees"),
    "use_ipex": (False, "the backends have kernels of their own"),
    "jit_mode_eval": (False, "each backend compiles what it compiles"),
    "torchdynamo": (None, "each backend compiles what it compiles"),
    "xpu_backend": (None, "NCCL on GPUs, gloo on CPUs"),
    "ray_scope": ("last", "there is no hyperparameter search"),
    "mp_parameters": ("", "it was SageMaker's"),
    "tpu_num_cores": (None, "JAX trains on all devices that it sees"),
    "tpu_metrics_debug": (False, "nothing is instrumented"),
    "include_tokens_per_second": (False, "write include_num_input_tokens_seen=True; logs then count tokens"),
    "use_legacy_prediction_loop": (False, "evaluation is the backend's"),
}
# Names that transformers had once -> today's, and fields that it had once.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "use_liger": "use_liger_kernel",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
}
FORMER = (
    *("group_by_length", "overwrite_output_dir", "logging_dir", "save_safetensors", "adafactor", "sharded_ddp"),
    *("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "include_inputs_for_metrics", "past_index"),
    *("push_to_hub_organization", "fp16_backend", "half_precision_backend", "fp16_opt_level", "use_mps_device", "use_ipex"),
    *("jit_mode_eval", "torchdynamo", "xpu_backend", "ray_scope", "mp_parameters", "tpu_num_cores", "tpu_metrics_debug"),
    *("include_tokens_per_second", "use_legacy_prediction_loop"),
)
# bf16 and fp16 say what the model was loaded in; transformers would check torch's device, which JAX may not share.
_PRECISION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")


@dataclass(frozen=True)
class Rules:
    """What becomes of the fields of one trainer's config: each is used, refused, or named in a warning.

    known: the config's own fields. renamed, former: names that its fields once had, and fields that it once had.
    """

    name: str
    known: frozenset[str]
    refused: Mapping[str, tuple[Any, str]]
    unused: Mapping[str, tuple[Any, str]]
    renamed: Mapping[str, str]
    former: Iterable[str]

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings under today's names, looked at.

        Raises:
            TypeError: a field that the config does not have, with the nearest one that it has.
            ValueError: a field is refused.
        """
        settings = dict(settings)
        for former, today in self.renamed.items():
            value = settings.pop(former, None)
            if value:  # warmup_ratio=0.0 and None say nothing
                if settings.get(today):
                    raise ValueError(f"{self.name}: give {today} or {former} (its former name), not both")
                settings[today] = value
                warn_renamed(self.name, former, today)
        former = {name: settings.pop(name) for name in self.former if name in settings}
        unknown = {name: value for name, value in settings.items() if name not in self.known}
        refuse_unknown(self.name, {*self.known, *self.renamed, *self.former}, unknown)
        self.check(former | settings)
        return settings

    def check(self, given: Mapping[str, Any], name: str | None = None) -> None:
        """That no given field is refused; those that change nothing are named in one warning. name: whose fields they are."""
        refuse_where_set(name or self.name, given, self.refused)
        warn_where_set(name or self.name, given, self.unused)

    def accept(self, args: TrainingArguments | None, kind: type[Any], given: Mapping[str, Any]) -> Any:
        """Arguments as the trainer reads them: its own config (`kind`) as it is; TRL's or transformers' with every field
        looked at. given: fields that came to the trainer itself, which count in a copy.

        Raises:
            TypeError: something else came.
            ValueError: a field is refused, or can't be what it is.
        """
        args = self._known(args, kind)
        if given:
            args = copy.copy(args)  # the user's own may serve another trainer
            for name, value in given.items():
                setattr(args, name, value)
        values = {name: getattr(args, name) for name in TrainerValues.model_fields if hasattr(args, name)}
        check_values(type(args).__name__, TrainerValues, values)
        return args

    def _known(self, args: TrainingArguments | None, kind: type[Any]) -> Any:
        if args is None:
            return kind()
        if isinstance(args, kind):
            return args
        if not isinstance(args, TrainingArguments):
            raise TypeError(f"args must be a {self.name} or transformers' TrainingArguments, got {type(args).__name__}")
        derived = {"accelerator_config", "do_eval", "label_names", "dataloader_pin_memory"}  # filled in by transformers itself
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in derived}
        foreign = {field.name for field in fields(args) if field.default != given.get(field.name)} - {*self.known, *self.unused}
        refuse_unknown(self.name, self.known, {name: given[name] for name in foreign - {*self.refused} if name in given})
        self.check({key: value for key, value in given.items() if value not in ("", [], {})}, type(args).__name__)
        for name in self.known:  # TRL's own that plain TrainingArguments lack
            if not hasattr(args, name):
                setattr(args, name, getattr(kind, name))
        return args


class NativeArguments(TrainingArguments):
    """TrainingArguments whose dtypes are the model's, not torch's device's."""

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both set; set at most one, and load the model in that dtype")
        if self.report_to is None:  # transformers 4 and older scripts meant by it that nothing reports
            self.report_to = "none"
        wanted = {name: getattr(self, name) for name in _PRECISION}
        for name in _PRECISION:
            setattr(self, name, False)
        super().__post_init__()
        for name, value in wanted.items():
            setattr(self, name, value)


def max_norm(args: Any) -> float | None:
    """What gradients are clipped to: None where args.max_grad_norm is 0, negative or None, as in transformers."""
    return args.max_grad_norm if args.max_grad_norm is not None and args.max_grad_norm > 0 else None


def check_precision(args: Any, dtype: str) -> None:
    """That bf16 or fp16 says what the model computes in."""
    asked = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if asked is None or asked == dtype:
        return
    if dtype == "float32":
        warn_once(
            f"{'bf16' if args.bf16 else 'fp16'}=True changes nothing: the model was loaded in float32 and computes in it "
            f"(from_pretrained(dtype=torch.{asked}) loads it in {asked})"
        )
        return
    raise ValueError(
        f"{'bf16' if args.bf16 else 'fp16'}=True asks for {asked}, and the model was loaded in {dtype}; load it with "
        f"dtype=torch.{asked}, or set {'bf16' if dtype == 'bfloat16' else 'fp16'}=True instead"
    )
