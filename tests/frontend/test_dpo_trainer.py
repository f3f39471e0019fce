"""The native DPOTrainer: TRL's losses, rewards and log-probs on both backends, with each kind of reference."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers import TrainingArguments

from jaxsloth import DPOConfig, DPOTrainer, FastLanguageModel
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.encode import Example
from jaxsloth.frontend import arguments, dpo_config
from jaxsloth.frontend.preference import References
from jaxsloth.objectives.preference import PreferenceLoss
from tests.support.modules import BACKENDS, TRAINING, lora, their_base
from tests.support.native import logged, native_model, under_their_peft
from tests.support.sources import transformers_model
from tests.support.tiny import CONFIG, WORDS, byte_tokenizer, random_weights, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
BAR = 1e-5
STEPS = 20
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
SETTINGS: dict[str, Any] = {
    **TRAINING,
    "max_steps": STEPS,
    "learning_rate": 2e-3,
    "warmup_steps": 2,
    "max_length": 48,
}
TEXTS = [
    {"prompt": f"say {n} ", "chosen": " ".join(WORDS[: 2 + n % 4]), "rejected": " ".join(WORDS[5 : 7 + n % 3])}
    for n in range(45)
]
# The prompt stands in both answers; the longest rows are cut.
MESSAGES = [
    {
        name: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name] + " lays" * (n % 3)}]
        for name in ("chosen", "rejected")
    }
    for n, row in enumerate(TEXTS)
]


@dataclasses.dataclass(frozen=True)
class Case:
    """trained: the adapter's B is not zero when the trainer is made. second: the reference is another model."""

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    trained: bool = False
    second: bool = False


CASES = {
    "texts": Case(TEXTS, {}),
    "messages, ipo, trained adapter": Case(
        MESSAGES,
        # A larger beta: at 0.1 the loss starts at 25, where a step of float32 is 2e-6.
        {
            "loss_type": "ipo",
            "beta": 0.5,
            "learning_rate": 1e-3,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "cosine",
        },
        trained=True,
    ),
    "hinge, second model": Case(TEXTS, {"loss_type": "hinge", "beta": 0.3, "adam_beta2": 0.95}, trained=True, second=True),
    "precomputed, two epochs": Case(
        MESSAGES,
        {"precompute_ref_log_probs": True, "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4}
        | {"learning_rate": 1e-3},
        trained=True,
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("dpo") / "model"))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("dpo") / "second", seed=1))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())


def started(checkpoint: str, backend: str, trained: bool) -> tuple[Any, Any]:
    """A model with an adapter, as it is fresh or as some training might have left it: the same on both backends."""
    model, tokenizer = native_model(checkpoint, backend)
    if trained:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model, tokenizer


@cache
def judged(name: str, checkpoint: str, folder: Path) -> list[dict[str, float]]:
    """TRL's log of the same run on transformers and PEFT."""
    case = CASES[name]
    ours, tokenizer = started(checkpoint, "torch", case.trained)
    settings = SETTINGS | {"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | case.settings
    rows = Dataset.from_list(case.rows)
    trainer = trl.DPOTrainer(
        under_their_peft(ours, their_base()),
        ref_model=transformers_model(CONFIG, random_weights(CONFIG, 1)) if case.second else None,
        args=trl.DPOConfig(str(folder), **settings, eval_strategy="steps", eval_steps=10, per_device_eval_batch_size=4),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def judges_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("judge")


# Each is a run of TRL's and one of ours; two show most, the others more.
@both
@pytest.mark.parametrize(
    "name", [name if place < 2 else pytest.param(name, marks=pytest.mark.slow) for place, name in enumerate(CASES)]
)
def test_losses_and_rewards_are_trls(name, backend, checkpoint, second, tmp_path, judges_folder):
    case = CASES[name]
    history = judged(name, checkpoint, judges_folder)
    model, tokenizer = started(checkpoint, backend, case.trained)
    reference = None
    if case.second:
        reference, _ = FastLanguageModel.from_pretrained(second, backend=backend, load_in_4bit=False, max_seq_length=64)
    settings = SETTINGS | case.settings | {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 4}
    rows = Dataset.from_list(case.rows)
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(str(tmp_path), **settings),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer,
    )
    done = trainer.train()
    found = trainer.state.log_history
    losses = logged(history, "loss")
    assert len(losses) == done.global_step >= STEPS
    assert np.ptp(losses) > 0.3 and np.ptp(logged(history, "rewards/margins")) > 0.3  # there is something to be wrong about
    for prefix in ("", "eval_"):
        assert logged(found, f"{prefix}loss") == pytest.approx(logged(history, f"{prefix}loss"), abs=BAR)
        # A log-prob is a sum of some 30 terms, about -100, where a step of float32 is 8e-6; rewards are beta times it, and
        # margins the difference of two.
        rounding = 1e-6 * np.abs(logged(history, f"{prefix}logps/chosen")).max()
        for metric in METRICS:
            theirs = logged(history, prefix + metric)
            bar = BAR + rounding * (1 if "logps" in metric else trainer.args.beta)
            bar *= 2 if "margins" in metric else 1
            assert len(theirs) == len(logged(history, f"{prefix}loss")) >= 2
            ours = logged(found, prefix + metric)
            if "accuracies" in metric:  # where nothing has moved yet, the sign of a margin is rounding's
                moved = np.abs(logged(history, f"{prefix}rewards/margins")) > 2 * (BAR + rounding)
                assert moved.any()
                ours, theirs = np.asarray(ours)[moved], np.asarray(theirs)[moved]
            assert ours == pytest.approx(theirs, abs=bar), prefix + metric
    for other in ("learning_rate", "epoch", "num_tokens", "eval_num_tokens"):
        assert logged(found, other) == pytest.approx(logged(history, other), rel=1e-9)
    assert logged(found, "grad_norm") == pytest.approx(logged(history, "grad_norm"), abs=1e-3)
    assert done.training_loss == pytest.approx(losses.mean(), abs=BAR)


def small(checkpoint, tmp_path, backend="torch", trained=True, **changes):
    given = {name: changes.pop(name) for name in list(changes) if name in ("eval_dataset", "ref_model", "peft_config")}
    model, tokenizer = started(checkpoint, backend, trained)
    config = DPOConfig(str(tmp_path / "out"), **SETTINGS | {"max_steps": 6} | changes)
    return DPOTrainer(model, args=config, train_dataset=TEXTS[:8], processing_class=tokenizer, **given)


@both
def test_a_resumed_run_goes_on_alike(checkpoint, tmp_path, backend):
    """Also that the reference of a resumed run is the adapter that the trainer was made with, not the checkpoint's."""
    whole = small(checkpoint, tmp_path / "whole", backend, save_strategy="steps", save_steps=3)
    whole.train()
    again = small(checkpoint, tmp_path, backend)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    for name in ("loss", "rewards/margins"):
        expected = logged(whole.state.log_history, name)
        assert logged(again.state.log_history, name) == pytest.approx(expected, abs=1e-6) and len(expected) == 6
    other, _ = started(checkpoint, backend, True)
    for changes, message in (
        ({"ref_model": other}, "settings have changed: reference: "),
        ({"label_smoothing": 0.1, "lr_scheduler_type": "constant"}, r"label_smoothing: 0.0 -> 0.1, lr_scheduler_type"),
    ):
        with pytest.raises(CheckpointError, match=message):
            small(checkpoint, tmp_path, backend, **changes).train(
                resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3")
            )


@both
def test_the_best_model_is_loaded_by_a_metric_of_the_rewards(checkpoint, tmp_path, backend):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    # Training makes the margin larger: where smaller is better the first checkpoint is the best, not the last.
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins", "greater_is_better": False}
    trainer = small(checkpoint, tmp_path, backend, eval_dataset=TEXTS[:4], **changes)
    trainer.train()
    margins = logged(trainer.state.log_history, "eval_rewards/margins")
    assert trainer.state.best_global_step == 2 * (int(margins.argmin()) + 1) < 6
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(margins.min(), abs=1e-6)


@pytest.mark.slow
def test_each_answer_is_compared_once(checkpoint, tmp_path):
    trainer = small(checkpoint, tmp_path, max_steps=12)  # three epochs
    asked: list[Example] = []
    score = trainer._references._score
    trainer._references._score = lambda examples: asked.extend(examples) or score(examples)
    trainer.train()
    assert len(asked) == len(set(asked)) == 16


def test_references_of_the_data_set_are_taken(checkpoint, tmp_path):
    """Columns that another run computed; rows without them are computed."""
    first = small(checkpoint, tmp_path, precompute_ref_log_probs=True)
    shown = first.train_dataset
    assert set(shown[0]) == {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"}
    names = ("ref_chosen_logps", "ref_rejected_logps")
    rows = [row | {name: own[name] - 1.0 for name in names} for row, own in zip(TEXTS[:7], shown, strict=False)]
    model, tokenizer = started(checkpoint, "torch", True)
    config = DPOConfig(str(tmp_path), **SETTINGS, precompute_ref_log_probs=True)
    trainer = DPOTrainer(model, args=config, train_dataset=[*rows, TEXTS[7]], processing_class=tokenizer)
    found = np.array([[row[name] for name in names] for row in trainer.train_dataset])
    expected = np.array([[row[name] for name in names] for row in shown])
    assert found[:7] == pytest.approx(expected[:7] - 1.0) and found[7] == pytest.approx(expected[7])
    assert first.train_dataset[0]["prompt_ids"] == byte_tokenizer()(TEXTS[0]["prompt"])["input_ids"]


def test_an_adapter_of_peft_config_is_compared_with_the_base(checkpoint, tmp_path):
    base, tokenizer = FastLanguageModel.from_pretrained(checkpoint, backend="torch", load_in_4bit=False, max_seq_length=64)
    torch.manual_seed(0)
    config = DPOConfig(str(tmp_path), **SETTINGS | {"max_steps": 1})
    trainer = DPOTrainer(base, args=config, train_dataset=TEXTS[:2], processing_class=tokenizer, peft_config=lora())
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/chosen"]) > 1e-3  # its B is random: it is not the base from the start


@pytest.mark.slow
def test_dropout_is_off_unless_asked_for(checkpoint, tmp_path):
    losses = {}
    for off in (True, False):
        model, tokenizer = native_model(checkpoint, "torch", lora_dropout=0.5)
        config = DPOConfig(str(tmp_path), **SETTINGS | {"max_steps": 3}, disable_dropout=off)
        trainer = DPOTrainer(model, args=config, train_dataset=TEXTS[:8], processing_class=tokenizer)
        trainer.train()
        losses[off] = logged(trainer.state.log_history, "loss")
    plain = small(checkpoint, tmp_path, trained=False, max_steps=3)
    plain.train()
    assert losses[True] == pytest.approx(logged(plain.state.log_history, "loss"), abs=1e-7)
    assert np.abs(losses[False] - losses[True]).max() > 1e-4


def test_what_notebooks_give(checkpoint, tmp_path):
    """Unsloth's DPO notebook: the loss' settings and the lengths on the trainer, transformers' arguments."""
    model, tokenizer = native_model(checkpoint, "torch")
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, max_steps=2, report_to="none", use_cpu=True)
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=args,
        beta=0.2,
        train_dataset=Dataset.from_list(TEXTS[:4]),
        tokenizer=tokenizer,
        max_length=40,
        max_prompt_length=3,
    )
    assert trainer._objective == PreferenceLoss("sigmoid", 0.2)
    assert max(len(example.tokens) for example in trainer.examples) <= 40
    assert all(len(row["prompt_ids"]) == 3 for row in trainer.train_dataset)
    assert trainer.train().global_step == 2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss_type": "robust"}, "loss_type must be one of sigmoid, ipo, hinge, got 'robust'"),
    "losses": ({"loss_type": ["sigmoid", "sft"]}, "loss_type must be one of sigmoid, ipo, hinge"),
    "smoothing": ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing belongs to the sigmoid loss"),
    "beta": ({"beta": 0.0}, "beta must be positive"),
    "truncation": ({"truncation_mode": "middle"}, "truncation_mode must be 'keep_start' or 'keep_end'"),
    "both dtypes": ({"fp16": True, "bf16": True}, "fp16 and bf16 are both set"),
    "optimizer": ({"optim": "adafactor"}, "optim must be one of adamw_torch"),
    "no eval": ({"eval_strategy": "steps"}, "there is no eval_dataset"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name, checkpoint, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        small(checkpoint, tmp_path, **changes)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_the_end_is_learnt_whatever_pads(checkpoint, tmp_path, pad):
    """A tokenizer without a padding token, and one whose padding is the EOS."""
    model, tokenizer = native_model(checkpoint, "torch")
    tokenizer.pad_token = pad
    config = DPOConfig(str(tmp_path), **SETTINGS | {"max_steps": 1})
    trainer = DPOTrainer(model, args=config, train_dataset=TEXTS[:4], processing_class=tokenizer)
    assert all(example.tokens[-1] == tokenizer.eos_token_id and example.learn[-1] for example in trainer.examples)
    step_batch = trainer._step_batches().batch(0)
    lengths = (step_batch.segments != 0).sum(axis=-1)
    last = np.take_along_axis(step_batch.targets, lengths[..., None] - 2, axis=-1)  # what the last but one token must predict
    assert (last == tokenizer.eos_token_id).all()
    assert trainer.train().global_step == 1


def test_what_the_trainer_is_given_stays_out_of_the_users_config(checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, "torch")
    config = DPOConfig(str(tmp_path), beta=0.3, report_to="none")
    trainer = DPOTrainer(model, args=config, beta=0.5, train_dataset=TEXTS[:2], processing_class=tokenizer)
    assert (trainer.args.beta, config.beta) == (0.5, 0.3)


def test_bad_models_and_arguments(checkpoint, tmp_path):
    model, _ = native_model(checkpoint, "torch")
    with pytest.raises(ValueError, match="ref_model is the model itself, or shares its base"):
        DPOTrainer(model, model, train_dataset=TEXTS)
    with pytest.raises(TypeError, match=r"FastLanguageModel.*TRL's DPOTrainer"):
        DPOTrainer(model, their_base(), train_dataset=TEXTS)
    with pytest.raises(TypeError, match="did you mean 'ref_model'"):
        DPOTrainer(model, ref_modle=None, train_dataset=TEXTS)
    with pytest.raises(ValueError, match="generate_during_eval=True"):
        DPOTrainer(model, train_dataset=TEXTS, generate_during_eval=True)
    with pytest.raises(TypeError, match="DPOConfig has no argument 'packing'"):
        DPOTrainer(model, args=trl.SFTConfig(str(tmp_path), packing=True, use_cpu=True, bf16=False), train_dataset=TEXTS)
    base, _ = FastLanguageModel.from_pretrained(checkpoint, backend="torch", load_in_4bit=False, max_seq_length=64)
    with pytest.raises(ValueError, match="call FastLanguageModel"):
        DPOTrainer(base, train_dataset=TEXTS)


def test_every_field_is_accounted_for():
    """Of transformers' and TRL's configs; and their defaults are TRL's."""
    theirs = {field.name: field.default for kind in (TrainingArguments, trl.DPOConfig) for field in dataclasses.fields(kind)}
    tables = [dpo_config.USED, set(dpo_config.REFUSED), set(dpo_config.UNUSED)]
    assert set(theirs) <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables))
    ours = {field.name: field.default for field in dataclasses.fields(dpo_config._Fields)}
    meant = {"gradient_checkpointing", "loss_type"}  # as the model was loaded; TRL's is a list of one
    assert {name for name in ours if name in theirs and ours[name] != theirs[name]} <= meant


@pytest.mark.parametrize("name", dpo_config.REFUSED)
def test_refused_fields(name, tmp_path):
    value = {"include_for_metrics": ["inputs"], "label_smoothing_factor": 0.1}.get(name, "something")
    with pytest.raises(ValueError, match=rf"{name}=.*: \w+"):
        DPOConfig(str(tmp_path), **{name: value})


def test_references_take_what_is_known():
    examples = [Example(np.arange(3), np.arange(3) >= place) for place in range(3)]  # the same tokens; what is learnt differs
    asked: list[Example] = []

    def score(unknown):
        asked.extend(unknown)
        return np.arange(len(unknown)) + 7.0

    references = References(score)
    references.know({examples[1]: 0.5})
    assert references.of([*examples, examples[0]]).tolist() == [7.0, 0.5, 8.0, 7.0]
    alike = [Example(example.tokens.copy(), example.learn.copy()) for example in examples]
    assert references.of(alike).tolist() == [7.0, 0.5, 8.0] and asked == [examples[0], examples[2]]


def test_rows_that_are_evaluated_again_are_not_scored_again(checkpoint, tmp_path):
    trainer = small(checkpoint, tmp_path)
    asked: list[Example] = []
    score = trainer._references._score
    trainer._references._score = lambda examples: asked.extend(examples) or score(examples)
    first = trainer.evaluate(eval_dataset=TEXTS[:4])
    known = len(trainer._references._known)
    again = trainer.evaluate(eval_dataset=TEXTS[:4])
    assert len(asked) == 8 == len(trainer._references._known) == known
    assert again["eval_loss"] == first["eval_loss"]
    trainer.evaluate(eval_dataset=TEXTS[:5])
    assert len(asked) == 10
