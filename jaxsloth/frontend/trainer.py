"""SFTTrainer: TRL's trainer, its names and its losses, over a backend's own train step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from jaxsloth.backend import OptimizerOptions, Step
from jaxsloth.batch import Batch
from jaxsloth.data.encode import Example
from jaxsloth.data.step_batches import StepBatches
from jaxsloth.frontend.base_trainer import PAD, BaseTrainer, Rows, RowSets, real_rows
from jaxsloth.frontend.collated import CollatedBatches, Collator, has_masked, shown
from jaxsloth.frontend.sft_config import RULES, SFTConfig
from jaxsloth.frontend.sft_data import encode
from jaxsloth.frontend.trainer_config import Reasons
from jaxsloth.objectives.causal_lm import CausalLoss

__all__ = ["SFTConfig", "SFTTrainer"]

# Collators whose batches are those that this trainer makes; labels are its own, so EOS is learnt also where it pads.
_COLLATORS = ("DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DefaultDataCollator", "DataCollatorWithPadding")


class SFTTrainer(BaseTrainer):
    """Supervised fine-tuning of a model's adapters. Rows are what `sft_data.encode` takes; args are an SFTConfig, TRL's, or
    transformers' TrainingArguments.

    Evaluation losses are transformers': each batch's mean, weighted by its rows. A data_collator of one's own makes the batches
    (`collated.Collator`); of transformers' usual ones this trainer makes them itself.
    """

    rules = RULES
    config = SFTConfig
    unused: ClassVar[Reasons] = {
        "dataset_batch_size": (None, "rows are tokenized one by one"),
        "num_of_sequences": (None, "packing takes all rows"),
        "chars_per_token": (None, "packing counts tokens"),
        "dataset_kwargs": (None, "rows are prepared by what they hold"),
        "infinite": (None, "epochs repeat until max_steps"),
        "eval_packing": (None, "held-out rows are never packed; the loss is the same"),
        "model_init_kwargs": (None, "the model is loaded already"),
    }
    deprecated_args = ("dataset_text_field", "packing", "dataset_num_proc", "neftune_noise_alpha")

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: RowSets | None = None,
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
        self.max_length = max_seq_length or self.max_length
        self.compute_metrics, self.preprocess_logits_for_metrics = compute_metrics, preprocess_logits_for_metrics
        self._formatting, self.data_collator = formatting_func, data_collator
        self._begin(train_dataset, eval_dataset, callbacks)

    def _encode(self, rows: Rows, name: str, limit: int | None = None) -> list[Example]:
        vocab = self.base.engine.model.spec.embedding.vocab
        return encode(rows, self.processing_class, self.args, self.max_length, self._formatting, vocab, name, limit)

    def _take_collator(self, collator: Any) -> None:
        if getattr(collator, "mlm", False):
            raise ValueError("data_collator has mlm=True, and a causal model learns the next token; set mlm=False")
        self._collator = self._own_collator(collator)

    def _own_collator(self, collator: Any) -> Collator | None:
        """None where this trainer makes the collator's batches by itself."""
        if collator is None or type(collator).__name__ in _COLLATORS:
            return None
        if self.args.packing:
            raise ValueError("packing=True packs rows by itself; set packing=False, and let the data_collator pack")
        vocab, multiple = self.base.engine.model.spec.embedding.vocab, self.args.pad_to_multiple_of
        return Collator(collator, vocab, multiple if isinstance(multiple, int) else PAD, self._devices.count)

    def _step_batches(self, stream: Callable[..., StepBatches] = StepBatches) -> StepBatches:
        return super()._step_batches(stream if self._collator is None else partial(CollatedBatches, self._collator))

    def _eval_batches(self, held_out: list[Example], size: int) -> list[Batch]:
        if self._collator is None:
            return super()._eval_batches(held_out, size)
        labelled, groups = has_masked(held_out), [held_out[start : start + size] for start in range(0, len(held_out), size)]
        return [self._collator.batches([group], labelled)[0] for group in groups]

    def _make_step(self, options: OptimizerOptions) -> Step:
        objective = CausalLoss(self.args.label_smoothing_factor, self.args.neftune_noise_alpha or 0.0)
        return self.base.engine.model.step(objective, options)

    def _evaluate(self, held_out: list[Example], batches: Sequence[Batch]) -> dict[str, float]:
        del held_out
        step = self.base.engine.model.eval_step(self.args.label_smoothing_factor)  # as transformers evaluates
        results = [(step(batch), real_rows(batch)) for batch in batches]
        sums = [(float(total) / tokens if tokens else math.nan, rows) for (total, tokens), rows in results]
        loss = sum(mean * rows for mean, rows in sums) / sum(rows for _, rows in sums)
        return {"loss": loss, "num_tokens": float(self.state.num_input_tokens_seen)}

    def _shown(self, examples: list[Example]) -> list[dict[str, Any]]:
        return [shown(example) for example in examples]
