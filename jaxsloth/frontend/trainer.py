"""SFTTrainer: TRL's trainer, its names and its losses, over a backend's own train step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxsloth.backend import OptimizerOptions
from jaxsloth.batch import IGNORE, Batch
from jaxsloth.data.encode import Example
from jaxsloth.frontend import base_trainer
from jaxsloth.frontend.base_trainer import BaseTrainer, Rows, check_collator, real_rows
from jaxsloth.frontend.sft_config import RULES, SFTConfig
from jaxsloth.frontend.sft_data import encode
from jaxsloth.frontend.trainer_config import Reasons
from jaxsloth.frontend.trainer_run import Step

__all__ = ["SFTConfig", "SFTTrainer"]

# Collators whose batches are those that this trainer makes; labels are its own, so EOS is learnt also where it pads.
_COLLATORS = ("DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DefaultDataCollator", "DataCollatorWithPadding")


class SFTTrainer(BaseTrainer):
    """Supervised fine-tuning of a model's adapters. Rows are what `sft_data.encode` takes; args are an SFTConfig, TRL's, or
    transformers' TrainingArguments.

    Evaluation losses are transformers': each batch's mean, weighted by its rows.
    """

    rules = RULES
    config = SFTConfig
    refused = base_trainer.REFUSED | {"neftune_noise_alpha": (None, "the backends add no noise to embeddings")}
    unused: ClassVar[Reasons] = {
        "dataset_batch_size": (None, "rows are tokenized one by one"),
        "num_of_sequences": (None, "packing takes all rows"),
        "chars_per_token": (None, "packing counts tokens"),
        "dataset_kwargs": (None, "rows are prepared by what they hold"),
        "infinite": (None, "epochs repeat until max_steps"),
    }
    taken_over = ("dataset_text_field", "packing", "dataset_num_proc")

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
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
        super().__init__(model, args, processing_class or tokenizer, peft_config, others)
        mask = "Mask labels in the rows (input_ids with labels), by completion_only_loss, or by train_on_responses_only"
        check_collator(data_collator, _COLLATORS, mask)
        if getattr(data_collator, "mlm", False):
            raise ValueError("data_collator has mlm=True, and a causal model learns the next token; set mlm=False")
        self.max_length = max_seq_length or self.max_length
        self.compute_metrics, self._preprocess = compute_metrics, preprocess_logits_for_metrics
        self._formatting = formatting_func
        self._begin(train_dataset, eval_dataset, callbacks)

    def _encode(self, rows: Rows, name: str) -> list[Example]:
        vocab = self.base.engine.model.spec.embedding.vocab
        return encode(rows, self.processing_class, self.args, self.max_length, self._formatting, vocab, name)

    def _make_step(self, options: OptimizerOptions) -> Step:
        return self.base.engine.model.train_step(options)

    def _evaluate(self, held_out: list[Example], batches: Sequence[Batch]) -> dict[str, float]:
        del held_out
        step = self.base.engine.model.eval_step()
        results = [(step(batch), real_rows(batch)) for batch in batches]
        sums = [(float(total) / tokens, rows) for (total, tokens), rows in results]
        return {"loss": sum(mean * rows for mean, rows in sums) / sum(rows for _, rows in sums)}

    def _shown(self, examples: list[Example]) -> list[dict[str, Any]]:
        return [_shown(example) for example in examples]


def _shown(example: Example) -> dict[str, list[int]]:
    labels = np.where(example.learn, example.tokens, IGNORE).tolist()
    return {"input_ids": example.tokens.tolist(), "attention_mask": [1] * len(labels), "labels": labels}
