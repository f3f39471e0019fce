"""DPOConfig: transformers' TrainingArguments with TRL's fields and former names, and what becomes of each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxsloth.frontend import trainer_config
from jaxsloth.frontend.trainer_config import NativeArguments, Reasons, Rules
from jaxsloth.objectives.preference import LOSSES, PreferenceLoss

USED = trainer_config.USED | {
    *("max_length", "max_prompt_length", "truncation_mode", "pad_to_multiple_of", "dataset_num_proc", "disable_dropout"),
    *("precompute_ref_log_probs", "precompute_ref_batch_size", "loss_type", "beta", "label_smoothing"),
}
# What older notebooks gave to the config, or to the trainer.
FORMER_REFUSED: Reasons = {
    "reference_free": (False, "the loss compares with a reference; without one, train with TRL's trainers"),
    "generate_during_eval": (False, "call generate() when you want answers"),
    "is_encoder_decoder": (False, "models are decoders"),
    "max_target_length": (None, "rows are cut at max_length, prompts at max_prompt_length"),
    "max_completion_length": (None, "rows are cut at max_length, prompts at max_prompt_length"),
    "tools": (None, "give the rows, which are conversations, a column of that name"),
    "rpo_alpha": (None, "the loss is of preferences alone"),
    "ref_adapter_name": (None, "the reference is the adapter as it is when the trainer is made; or give a ref_model"),
}
FORMER_UNUSED: Reasons = {
    "label_pad_token_id": (-100, "padding is never read: rows have lengths"),
    "padding_value": (None, "padding is never read: rows have lengths"),
    "ref_model_init_kwargs": (None, "a ref_model is loaded already"),
    "force_use_ref_model": (False, "a ref_model that is given is used"),
    "model_adapter_name": (None, "the active adapter is trained"),
    "model_init_kwargs": (None, "the model is loaded already"),
    "base_model_attribute_name": ("model", "the base is known"),
    "use_logits_to_keep": (False, "which logits are formed is the backend's choice"),
    "use_liger_loss": (False, "the backends have kernels of their own"),
}
REFUSED: Reasons = (
    trainer_config.REFUSED
    | FORMER_REFUSED
    | {
        "loss_weights": (None, "one loss is taken at a time"),
        "ld_alpha": (None, "every token of an answer counts alike; use TRL's trainer"),
        "f_divergence_type": ("reverse_kl", "rewards are log-ratios; use TRL's trainer"),
        "use_weighting": (False, "every pair counts alike; use TRL's trainer"),
        "sync_ref_model": (False, "the reference stays as it is (TRL refuses this for adapters too)"),
        "router_aux_loss_coef": (None, "there are no mixtures of experts"),
        "activation_offloading": (False, "ask for it by from_pretrained(use_gradient_checkpointing='offload')"),
        "label_smoothing_factor": (0.0, "tokens are not smoothed; label_smoothing smooths the preference"),
        "neftune_noise_alpha": (None, "a preference step adds no noise to embeddings; SFTTrainer does"),
    }
)
UNUSED: Reasons = (
    trainer_config.UNUSED
    | FORMER_UNUSED
    | {
        "f_alpha_divergence_coef": (0.5, "it belongs to f_divergence_type"),
        "discopop_tau": (0.05, "it belongs to a loss_type that is not here"),
        "ref_model_mixup_alpha": (0.6, "it belongs to sync_ref_model"),
        "ref_model_sync_steps": (512, "it belongs to sync_ref_model"),
        "padding_free": (False, "rows are padded, as TRL does for now"),
        "pad_token": (None, "padding is never read: rows have lengths"),
        "trust_remote_code": (False, "no code of a repository is run"),
    }
)


@dataclass
class _Fields(NativeArguments):
    """TRL's fields and defaults (trl.DPOConfig), where they are not transformers'. gradient_checkpointing: False leaves it as
    the model was loaded. max_prompt_length: prompts keep their last tokens; TRL had it until 1.0."""

    learning_rate: float = 1e-6
    logging_steps: float = 10
    bf16: bool | None = None  # type: ignore[assignment]
    model_init_kwargs: dict[str, Any] | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    disable_dropout: bool = True
    dataset_num_proc: int | None = None
    max_length: int | None = 1024
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_start"
    padding_free: bool = False
    pad_to_multiple_of: int | str | None = "auto"
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    label_smoothing: float = 0.0
    beta: float = 0.1
    use_weighting: bool = False
    discopop_tau: float = 0.05
    activation_offloading: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    pad_token: str | None = None


RULES = Rules(
    name="DPOConfig",
    known=frozenset(field.name for field in fields(_Fields)),
    refused=REFUSED,
    unused=UNUSED,
    renamed=trainer_config.RENAMED,
    former=(*trainer_config.FORMER, *FORMER_REFUSED, *(FORMER_UNUSED.keys() - {"model_init_kwargs"})),
)


class DPOConfig(_Fields):
    """What a preference run is: transformers' and TRL's fields of today, and the former names of some.

    max_length: answers are cut there with their prompts; None takes the model's max_seq_length.

    Raises:
        TypeError: a field that it does not have, with the nearest one that it has.
        ValueError: a field is refused, or fp16 and bf16 are both set.
    """

    def __init__(self, output_dir: str | None = None, **settings: Any) -> None:
        super().__init__(output_dir=output_dir, **RULES.settle(settings))


def objective_of(args: Any) -> PreferenceLoss:
    """args' loss; ValueError for one that is not here, or a beta or label_smoothing that can't be."""
    names = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    if len(names) != 1 or names[0] not in LOSSES:
        raise ValueError(
            f"loss_type must be one of {', '.join(LOSSES)}, got {args.loss_type!r}; others train with TRL's DPOTrainer"
        )
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end', got {args.truncation_mode!r}")
    return PreferenceLoss(names[0], args.beta, args.label_smoothing)
