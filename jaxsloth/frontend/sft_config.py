"""SFTConfig: transformers' TrainingArguments with TRL's fields and former names, and what becomes of each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxsloth.frontend import trainer_config
from jaxsloth.frontend.trainer_config import NativeArguments, Reasons, Rules

USED = trainer_config.USED | {
    *("dataset_text_field", "dataset_num_proc", "max_length", "packing", "completion_only_loss", "assistant_only_loss"),
    *("pad_to_multiple_of", "chat_template_path", "eos_token", "neftune_noise_alpha"),
    "embedding_learning_rate",
    "label_smoothing_factor",
}
REFUSED: Reasons = trainer_config.REFUSED | {
    "router_aux_loss_coef": (None, "there are no mixtures of experts"),
    "loss_type": ("nll", "the loss is plain cross-entropy; use TRL's trainer"),
    "padding_free": (False, "packing=True packs rows without padding"),
    "truncation_mode": ("keep_start", "rows are cut at their end"),
    "packing_strategy": ("bfd", "no row is split"),
    "shuffle_dataset": (False, "every epoch has its own order already"),
    "activation_offloading": (False, "ask for it by from_pretrained(use_gradient_checkpointing='offload')"),
}
UNUSED: Reasons = trainer_config.UNUSED | {
    "model_init_kwargs": (None, "the model is loaded already"),
    "trust_remote_code": (False, "no code of a repository is run"),
    "dataset_kwargs": (None, "rows are prepared by what they hold"),
    "eval_packing": (None, "held-out rows are never packed; the loss is the same"),
    "pad_token": (None, "padding is never read: rows have lengths"),
    "dataset_batch_size": (None, "rows are tokenized one by one"),
    "num_of_sequences": (None, "packing takes all rows"),
    "chars_per_token": (None, "packing counts tokens"),
}


@dataclass
class _Fields(NativeArguments):
    """TRL's fields and defaults (trl.SFTConfig), where they are not transformers'. gradient_checkpointing: None leaves it as
    the model was loaded."""

    learning_rate: float = 2e-5
    logging_steps: float = 10
    bf16: bool | None = None  # type: ignore[assignment]
    dataset_text_field: str = "text"
    dataset_num_proc: int | None = None
    dataset_kwargs: dict[str, Any] | None = None
    max_length: int | None = None
    packing: bool = False
    packing_strategy: str = "bfd"
    eval_packing: bool | None = None
    padding_free: bool = False
    pad_to_multiple_of: int | str | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    loss_type: str = "nll"
    truncation_mode: str = "keep_start"
    shuffle_dataset: bool = False
    activation_offloading: bool = False
    chat_template_path: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    model_init_kwargs: dict[str, Any] | None = None
    trust_remote_code: bool = False
    router_aux_loss_coef: float | None = None
    embedding_learning_rate: float | None = None


_FORMER = ("dataset_batch_size", "num_of_sequences", "chars_per_token")
RULES = Rules(
    name="SFTConfig",
    known=frozenset(field.name for field in fields(_Fields)),
    refused=REFUSED,
    unused=UNUSED,
    renamed=trainer_config.RENAMED | {"max_seq_length": "max_length"},
    former=(*trainer_config.FORMER, *_FORMER),
)


class SFTConfig(_Fields):
    """What a supervised run is: transformers' and TRL's fields of today, and the former names of some.

    max_length: rows are cut there; None takes the model's max_seq_length.
    embedding_learning_rate: of the embedding and the head, where they are trained whole (modules_to_save), in place of
        learning_rate, whose schedule it follows; Unsloth's UnslothTrainingArguments has it.

    Raises:
        TypeError: a field that it does not have, with the nearest one that it has.
        ValueError: a field is refused, or fp16 and bf16 are both set.
    """

    def __init__(self, output_dir: str | None = None, **settings: Any) -> None:
        super().__init__(output_dir=output_dir, **RULES.settle(settings))
