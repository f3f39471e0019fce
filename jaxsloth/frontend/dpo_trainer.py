"""DPOTrainer: TRL's trainer, its names and its losses, over a backend's own preference step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from jaxsloth.backend import OptimizerOptions, Step
from jaxsloth.batch import Batch
from jaxsloth.convert.digest import base_digest, values_digest
from jaxsloth.data.encode import Example
from jaxsloth.data.step_batches import eval_batches
from jaxsloth.frontend import base_trainer
from jaxsloth.frontend.adapters import folded_adapter, native_adapter, push_for_inference, scaled
from jaxsloth.frontend.base_trainer import PAD, BaseTrainer, Rows, RowSets, check_collator, longest, ours, real_rows
from jaxsloth.frontend.dpo_config import FORMER_REFUSED, FORMER_UNUSED, RULES, DPOConfig, objective_of
from jaxsloth.frontend.dpo_data import ANSWERS, REFERENCES, encode_pairs
from jaxsloth.frontend.preference import Compared, References, ReferredStep, pair_metrics, score_rows
from jaxsloth.frontend.rows import all_of
from jaxsloth.frontend.trainer_run import Metrics, means
from jaxsloth.models.names import lora_names
from jaxsloth.objectives.preference import REFERENCE

__all__ = ["DPOConfig", "DPOTrainer"]


class DPOTrainer(BaseTrainer):
    """Direct preference optimization of a model's adapters. Rows are what `dpo_data.encode_pairs` takes; args are a DPOConfig,
    TRL's, or transformers' TrainingArguments.

    What the policy is compared with, as in TRL: ref_model, another model of FastLanguageModel.from_pretrained; without one, the
    model as it is when the trainer is made. That is the base with the adapter off where the adapter is fresh or comes from
    peft_config, and a copy of the adapter's values where it was trained before (by SFT). Each answer's reference is computed
    once, when it is first visited, or all at the beginning with precompute_ref_log_probs.

    Examples 2i and 2i + 1 are the chosen and the rejected answer of pair i. The loss is the mean over all pairs of a step, and
    over all held-out pairs.
    """

    rules = RULES
    config = DPOConfig
    refused = base_trainer.REFUSED | FORMER_REFUSED
    unused = FORMER_UNUSED
    deprecated_args = (
        *("beta", "label_smoothing", "loss_type", "max_length", "max_prompt_length", "truncation_mode"),
        *("precompute_ref_log_probs", "dataset_num_proc", "disable_dropout"),
    )
    group_size = 2
    metrics = (
        *("loss", "num_tokens", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    )

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: RowSets | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: Sequence[Any] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        peft_config: Any = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> None:
        super().__init__(model, args, processing_class or tokenizer, peft_config, others)
        self.data_collator = data_collator
        self.compute_metrics, self.preprocess_logits_for_metrics = compute_metrics, preprocess_logits_for_metrics
        self._objective = objective_of(self.args)
        if self.args.disable_dropout:
            _disable_dropout(self.model)
        self._starting = None if ref_model is not None else self._starting_point(fresh=peft_config is not None)
        self._references = References(self._score)
        self.ref_model = ref_model
        if ref_model is not None and ours(ref_model, "DPOTrainer") is self.base:
            raise ValueError(
                "ref_model is the model itself, or shares its base; leave ref_model out (the reference is then the model as it "
                "is now), or load another"
            )
        self._begin(train_dataset, eval_dataset, callbacks)
        if self.args.precompute_ref_log_probs:
            push_for_inference(self.base)
            for examples in filter(None, (self.examples, all_of(self.held_out))):
                self._references.of(examples)

    def _take_collator(self, collator: Any) -> None:
        check_collator(collator, ("DataCollatorForPreference", "DPODataCollatorWithPadding"), "Leave it out")

    def _starting_point(self, fresh: bool) -> dict[str, np.ndarray] | None:
        """The values of what is active, None where it may be turned off for them: every B is zero, and nothing is trained
        whole. fresh: the reference is the base, whatever B is.

        Raises:
            ValueError: biases are trained, which in PEFT no adapter holds: TRL's reference would learn with the policy.
        """
        spec, values = native_adapter(self.base)
        assert spec.lora is not None
        if spec.lora.bias != "none":
            raise ValueError(
                f"bias={spec.lora.bias!r} trains the base's own biases, so the model itself can't stand for the reference; "
                "give ref_model, another model of FastLanguageModel.from_pretrained, or take bias='none'"
            )
        self._scale = spec.lora.scale
        names = [lora_names(module)[1] for module in spec.lora.modules]
        if fresh:
            values |= {name: np.zeros_like(values[name]) for name in names}
        return values if spec.lora.modules_to_save or any(values[name].any() for name in names) else None

    def _score(self, examples: Sequence[Example]) -> np.ndarray:
        """The reference's summed log-probs, float32 ``[examples]``."""
        model, batches = self.base.engine.model, self._reference_batches(examples)
        if self.ref_model is not None:
            reference = ours(self.ref_model, "DPOTrainer")
            push_for_inference(reference)
            return score_rows(reference.engine.model.row_log_probs(), batches)
        if self._starting is None:
            return score_rows(model.row_log_probs(adapters=False), batches)
        current, lora = model.trainable(), model.spec.lora
        assert lora is not None
        model.load_trainable(scaled(self._starting, self._scale / lora.scale if self._scale != lora.scale else 1.0))
        try:
            return score_rows(model.row_log_probs(), batches)
        finally:
            model.load_trainable(current)

    def _reference_batches(self, examples: Sequence[Example]) -> list[Batch]:
        pairs = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        count = self._devices.count
        return eval_batches(examples, pairs * count * self.group_size, PAD, longest(examples), count)

    def _encode(self, rows: Rows, name: str, limit: int | None = None) -> list[Example]:
        vocab = self.base.engine.model.spec.embedding.vocab
        examples, known = encode_pairs(rows, self.processing_class, self.args, self.max_length, vocab, name, limit)
        self._references.know(known)
        return examples

    def _make_step(self, options: OptimizerOptions) -> Step:
        step_batches = self._run.step_batches
        if self._starting is not None:
            # The copy and what is trained take turns in one place, so all that the run visits is scored before it begins.
            steps = range(min(self.state.max_steps, step_batches.steps_per_epoch))
            self._references.of([self.examples[row] for step in steps for row in step_batches.rows_of(step)])
        step = self.base.engine.model.step(self._objective, options)
        return ReferredStep(step, step_batches, self.examples, self._references)

    def _deciding(self) -> dict[str, Any]:
        return super()._deciding() | {"reference": self._reference_digest()}

    def _reference_digest(self) -> str:
        if self.ref_model is not None:
            reference = ours(self.ref_model, "DPOTrainer")
            return f"{base_digest(reference.loaded.checkpoint)} {values_digest(folded_adapter(reference)[1])}"
        return "the base" if self._starting is None else f"{values_digest(self._starting)} {self._scale}"

    def measure(self, result: Compared) -> Sequence[Metrics]:
        return result.metrics(self._objective.beta)

    def _evaluate(self, held_out: list[Example], batches: Sequence[Batch]) -> dict[str, float]:
        reference = self._references.of(held_out)
        policy = score_rows(self.base.engine.model.row_log_probs(), batches)
        arrays = {REFERENCE: reference, "counts": np.array([example.targets for example in held_out])}
        ends = np.cumsum([real_rows(batch) for batch in batches])[:-1]
        parts = zip(np.split(policy, ends), np.split(reference, ends), strict=True)
        found = means([pair_metrics(own, other, self._objective.beta) for own, other in parts])
        losses, _ = self._objective.losses_and_grads(np, policy.astype(np.float64), arrays)
        return {"loss": float(losses.mean()), "num_tokens": float(self.state.num_input_tokens_seen)} | found

    def _shown(self, examples: list[Example]) -> list[dict[str, Any]]:
        shown = []
        for chosen, rejected in zip(examples[0::2], examples[1::2], strict=True):
            start = int(np.argmax(chosen.learn)) if chosen.learn.any() else int(np.argmax(rejected.learn))
            row: dict[str, Any] = {"prompt_ids": chosen.tokens[:start].tolist()}
            row |= {f"{name}_ids": own.tokens[start:].tolist() for name, own in zip(ANSWERS, (chosen, rejected), strict=True)}
            if self.args.precompute_ref_log_probs:
                row |= dict(zip(REFERENCES, self._references.of([chosen, rejected]).tolist(), strict=True))
            shown.append(row)
        return shown


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
