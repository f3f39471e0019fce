"""The native SFTTrainer: TRL's losses on both backends, transformers' flow of logs, evaluations, checkpoints and callbacks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, EarlyStoppingCallback, TrainerCallback, TrainingArguments

from jaxsloth import DPOConfig, FastLanguageModel, SFTConfig, SFTTrainer
from jaxsloth.data.errors import DataError
from jaxsloth.frontend import arguments, sft_config
from jaxsloth.frontend.adapters import base_of
from jaxsloth.frontend.argument_values import TrainerValues, check_values
from jaxsloth.frontend.optimizer_view import go_on_from, scheduler_of
from jaxsloth.kernels.dropout.contract import module_key
from jaxsloth.kernels.embedding_noise.torch_ops import embedding_noise
from tests.support.modules import BACKENDS, TRAINING, their_base
from tests.support.native import logged, native_model, under_their_peft
from tests.support.tiny import CONFIG, WORDS, byte_tokenizer, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
BAR = 1e-5
STEPS = 20
SETTINGS: dict[str, Any] = {
    **TRAINING,
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "warmup_steps": 2,
    "max_length": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("sft") / "model"))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())


def token_rows(count=45):
    generator = np.random.default_rng(0)
    rows = [generator.integers(2, CONFIG["vocab_size"], generator.integers(8, 40)).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in rows]


def sentence(number):
    return " ".join(WORDS[number % 5 : number % 5 + 2 + number % 7])


ROWS: dict[str, list[dict[str, Any]]] = {
    "tokens": token_rows(),
    "text": [{"text": f"{n} {sentence(n)}", "other": n} for n in range(45)],
    "prompt_completion": [{"prompt": f"say {n}: ", "completion": sentence(n)} for n in range(45)],
    "messages": [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": sentence(n)}]}
        for n in range(45)
    ],
}
# Rows of one length: without padding, transformers' noise is as large as the paper's.
ALIKE = [{"input_ids": np.random.default_rng(n).integers(2, CONFIG["vocab_size"], 24).tolist()} for n in range(45)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("tokens", {}),
    "tokens in order": ("tokens", {"train_sampling_strategy": "sequential"}),
    "tokens, accumulation": ("tokens", {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}),
    "text": ("text", {"lr_scheduler_type": "constant_with_warmup", "weight_decay": 0.0}),
    "prompt_completion": ("prompt_completion", {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 4}),
    "messages": ("messages", {"max_grad_norm": 0.0, "adam_beta2": 0.95}),
    "smoothed labels": ("tokens", {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}),
}


@cache
def judged(case: str, checkpoint: str, folder: Path) -> list[dict[str, float]]:
    """TRL's log of the same run on transformers and PEFT; its losses are not rounded."""
    data, changes = CASES[case]
    ours, tokenizer = native_model(checkpoint, "torch")
    theirs = under_their_peft(ours, their_base())
    settings = SETTINGS | {"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | changes
    rows = Dataset.from_list(ROWS[data])
    extra = {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 4}
    trainer = trl.SFTTrainer(
        theirs,
        args=trl.SFTConfig(output_dir=str(folder), **settings, **extra),
        train_dataset=rows,
        eval_dataset=rows.select(range(7)),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def judges_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("judge")


@both
@pytest.mark.parametrize("case", CASES)
def test_losses_are_trls(case, backend, checkpoint, tmp_path, judges_folder):
    history = judged(case, checkpoint, judges_folder)
    losses = logged(history, "loss")
    data, changes = CASES[case]
    model, tokenizer = native_model(checkpoint, backend)
    config = SFTConfig(str(tmp_path), **SETTINGS | changes, eval_strategy="steps", eval_steps=10, per_device_eval_batch_size=4)
    rows = Dataset.from_list(ROWS[data])
    trainer = SFTTrainer(model, args=config, train_dataset=rows, eval_dataset=rows.select(range(7)), processing_class=tokenizer)
    done = trainer.train()
    ours = logged(trainer.state.log_history, "loss")
    assert len(ours) == len(losses) == done.global_step >= STEPS
    assert np.ptp(losses) > 0.3  # there is something to be wrong about
    assert np.abs(ours - losses).max() < BAR
    for name in ("learning_rate", "epoch", "num_tokens"):
        assert logged(trainer.state.log_history, name) == pytest.approx(logged(history, name), rel=1e-9)
    assert logged(trainer.state.log_history, "eval_loss") == pytest.approx(logged(history, "eval_loss"), abs=BAR)
    assert logged(trainer.state.log_history, "grad_norm") == pytest.approx(logged(history, "grad_norm"), abs=1e-3)
    assert done.training_loss == pytest.approx(losses.mean(), abs=BAR)


@cache
def judged_with_noise(checkpoint: str, folder: Path) -> list[dict[str, float]]:
    """TRL's log of a run in which transformers' own NEFTune hook draws its uniform numbers where we draw them."""
    ours, tokenizer = native_model(checkpoint, "torch")
    theirs = under_their_peft(ours, their_base())
    drawn = itertools.count()

    def uniform_(tensor, low, high):
        batch, length, channels = tensor.shape
        assert low == -high
        words = torch.tensor(module_key(SETTINGS["seed"], next(drawn), "model.embed_tokens"))
        unit = math.sqrt(length * channels)  # an alpha whose noise is in [-1, 1)
        noise = embedding_noise(words, torch.arange(batch), torch.ones(batch, length).int(), channels, alpha=unit)
        return tensor.copy_(high * noise)

    settings = SETTINGS | {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "neftune_noise_alpha": 10.0}
    trainer = trl.SFTTrainer(
        theirs,
        args=trl.SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(ALIKE),
        processing_class=tokenizer,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", uniform_)
        trainer.train()
    assert next(drawn) == STEPS
    return trainer.state.log_history


@both
def test_noise_on_embeddings_is_transformers(backend, checkpoint, tmp_path, judges_folder):
    losses = logged(judged_with_noise(checkpoint, judges_folder), "loss")
    found = []
    for alpha in (10.0, None):
        model, tokenizer = native_model(checkpoint, backend)
        config = SFTConfig(str(tmp_path), **SETTINGS, neftune_noise_alpha=alpha)
        trainer = SFTTrainer(model, args=config, train_dataset=ALIKE, processing_class=tokenizer)
        trainer.train()
        found.append(logged(trainer.state.log_history, "loss"))
    assert np.abs(found[0] - losses).max() < BAR
    assert np.abs(found[1] - losses).max() > 1e-3


def small(checkpoint, tmp_path, backend="torch", rows=None, **changes):
    trainer = {name: changes.pop(name) for name in list(changes) if name in ("callbacks", "compute_metrics", "eval_dataset")}
    model, tokenizer = native_model(checkpoint, backend)
    config = SFTConfig(str(tmp_path / "out"), **SETTINGS | {"max_steps": 6} | changes)
    return SFTTrainer(model, args=config, train_dataset=rows or ROWS["tokens"][:8], processing_class=tokenizer, **trainer)


def checkpoints(tmp_path):
    return sorted(int(folder.name.split("-")[1]) for folder in (tmp_path / "out").glob("checkpoint-*"))


@both
def test_the_best_model_is_loaded_at_the_end(checkpoint, tmp_path, backend):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    held_out = ROWS["tokens"][20:24]
    # Training makes the loss smaller: where greater is better the first checkpoint is the best, not the last.
    changes |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = small(checkpoint, tmp_path, backend, eval_dataset=held_out, learning_rate=5e-2, **changes)
    trainer.train()
    losses = logged(trainer.state.log_history, "eval_loss")
    best = int(losses.argmax())
    assert trainer.state.best_global_step == 2 * (best + 1) < 6
    assert checkpoints(tmp_path) == sorted({trainer.state.best_global_step, 6})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    saved = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["best_metric"] == losses[best]


def test_a_metric_of_ones_own_decides(checkpoint, tmp_path):
    values = iter([0.1, 0.9, 0.5])

    def metrics(seen):
        assert seen.predictions.shape[:2] == seen.label_ids.shape and seen.predictions.shape[2] == CONFIG["vocab_size"]
        assert seen.label_ids[0, 3:6].tolist() == ROWS["tokens"][20]["labels"][3:6]
        return {"score": next(values)}

    trainer = small(
        checkpoint,
        tmp_path,
        eval_dataset=ROWS["tokens"][20:23],
        compute_metrics=metrics,
        num_train_epochs=3,
        max_steps=-1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.9 and trainer.state.best_global_step == 8
    assert checkpoints(tmp_path) == [4, 8, 12]
    assert logged(trainer.state.log_history, "eval_score").tolist() == [0.1, 0.9, 0.5]


@both
def test_a_resumed_run_goes_on_alike(checkpoint, tmp_path, backend):
    whole = small(checkpoint, tmp_path / "whole", backend)
    whole.train()
    first = small(checkpoint, tmp_path, backend, save_strategy="steps", save_steps=3, optim="adamw_torch")
    first.train()
    again = small(checkpoint, tmp_path, backend)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    losses = [logged(trainer.state.log_history, "loss") for trainer in (whole, again)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-7) and len(losses[1]) == 6
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen > 0


class Told(TrainerCallback):
    def __init__(self):
        self.events: list[str] = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.events.append(name)
        return super().__getattribute__(name)


def test_callbacks_are_told_and_can_stop(checkpoint, tmp_path):
    told = Told()
    trainer = small(
        checkpoint,
        tmp_path,
        callbacks=[told],
        eval_dataset=ROWS["tokens"][:2],
        eval_strategy="steps",
        eval_steps=4,
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
        logging_steps=2,
    )
    trainer.train()
    each = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    end = ["on_log", "on_log", "on_evaluate", "on_save", "on_epoch_end", "on_log", "on_train_end"]
    expected = ["on_init_end", "on_train_begin", "on_epoch_begin", *each * 2, "on_log", *each * 2, *end]
    assert told.events == expected
    stopping = small(
        checkpoint,
        tmp_path,
        callbacks=[EarlyStoppingCallback(1)],
        eval_dataset=ROWS["tokens"][20:24],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=0.5,
        max_steps=30,
    )
    assert stopping.train().global_step < 15


@both
def test_a_callback_sees_what_is_trained(checkpoint, tmp_path, backend):
    """Parameters, passes of the module and answers during the run are those of that moment, and don't disturb it."""
    seen: list[Any] = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, *, model: Any, **others):
            ids = torch.tensor([ROWS["tokens"][0]["input_ids"]])
            with torch.no_grad():
                loss = model(ids, labels=ids).loss.item()
            model.generate(input_ids=ids, max_new_tokens=2)
            seen.append(loss)

    looked = small(checkpoint, tmp_path, backend, callbacks=[Looks()])
    looked.train()
    alone = small(checkpoint, tmp_path / "alone", backend)
    alone.train()
    assert len(set(seen)) == 6
    losses = [logged(trainer.state.log_history, "loss").tolist() for trainer in (looked, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


def test_logged_losses_are_means_of_their_steps(checkpoint, tmp_path):
    every, third = (small(checkpoint, tmp_path / name, logging_steps=n) for name, n in (("one", 1), ("three", 3)))
    every.train()
    third.train()
    losses = logged(every.state.log_history, "loss")
    assert logged(third.state.log_history, "loss") == pytest.approx([losses[:3].mean(), losses[3:].mean()], abs=1e-6)


def test_speeds_are_of_what_was_trained_by_the_wall_clock(checkpoint, tmp_path):
    """As transformers has them, but counted in rows, not in whole batches: 21 rows by 8 end with 5. A run that goes
    on counts its own part."""
    settings = {"max_steps": -1, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 3}
    settings |= {"rows": ROWS["tokens"][:21], "include_num_input_tokens_seen": "non_padding"}
    for resume, epochs in ((False, 1), (True, 2)):
        trainer = small(checkpoint, tmp_path, num_train_epochs=epochs, **settings)
        start = time.perf_counter()
        found = trainer.train(resume_from_checkpoint=resume).metrics
        wall = time.perf_counter() - start
        assert 0 < found["train_runtime"] <= wall
        for name, count in (("samples", 21), ("steps", 3)):
            assert found[f"train_{name}_per_second"] * found["train_runtime"] == pytest.approx(count, rel=0.01)
        tokens = sum(len(row["input_ids"]) for row in ROWS["tokens"][:21])
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        assert last["num_input_tokens_seen"] == tokens * epochs
        speed = trainer.state.log_history[-1]["train_tokens_per_second"]
        assert speed * found["train_runtime"] == pytest.approx(tokens, rel=0.05)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt"])
def test_rates_are_transformers(name, tmp_path):
    args = SFTConfig(str(tmp_path), lr_scheduler_type=name, learning_rate=0.1, warmup_ratio=0.15)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = transformers.get_scheduler(name, optimizer, math.ceil(20 * 0.15), 20)
    ours = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(2)]
    stepped, resumed = (scheduler_of(args, own, 20) for own in ours)
    for step in range(20):
        go_on_from(resumed, step)
        assert [own.param_groups[0]["lr"] for own in ours] == pytest.approx([scheduler.get_last_lr()[0]] * 2, rel=1e-12)
        for own, rates in ((optimizer, scheduler), (ours[0], stepped)):
            own.step()
            rates.step()


def test_every_field_is_accounted_for():
    """Of transformers' and TRL's configs; and their defaults are TRL's."""
    theirs = {field.name: field.default for kind in (TrainingArguments, trl.SFTConfig) for field in dataclasses.fields(kind)}
    tables = [sft_config.USED, set(sft_config.REFUSED), set(sft_config.UNUSED)]
    assert set(theirs) <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables))
    ours = {field.name: field.default for field in dataclasses.fields(sft_config._Fields)}
    meant = {"gradient_checkpointing", "max_length", "pad_to_multiple_of"}  # as the model was loaded, or the backend's choice
    different = {name for name in ours if name in theirs and ours[name] != theirs[name]}
    assert different <= meant


@pytest.mark.parametrize("name", sft_config.REFUSED)
def test_refused_fields(name, tmp_path):
    value = {"include_for_metrics": ["inputs"]}.get(name, "something")
    with pytest.raises(ValueError, match=rf"{name}=.*: \w+"):
        SFTConfig(str(tmp_path), **{name: value})


@pytest.mark.parametrize("name", sft_config.UNUSED)
def test_fields_that_change_nothing_are_named(name):
    with pytest.warns(UserWarning, match=rf"{name}=.*\("):
        sft_config.RULES.check({name: "something"})


def test_transformers_arguments_and_former_names(checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, "torch")
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=1,
        max_steps=3,
        fp16=True,
        learning_rate=2e-4,
        logging_steps=1,
        optim="paged_adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        report_to="none",
        ddp_find_unused_parameters=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=2,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = SFTTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=Dataset.from_list([{"words": sentence(n)} for n in range(9)]),
            dataset_text_field="words",
            max_seq_length=32,
            dataset_num_proc=2,
            packing=False,
            args=args,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(said) == 3, said
    assert "ddp_find_unused_parameters=False" in said[0] and "dataloader_num_workers=2" in said[0]
    assert "loaded in float32" in said[1] and "nothing is paged" in said[2]
    assert max(len(example.tokens) for example in trainer.examples) <= 32
    assert all(example.tokens[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id for example in trainer.examples[:1])
    assert all(example.learn[-1] for example in trainer.examples)  # EOS is learnt, though it is the padding token
    assert trainer.train_dataset[0]["labels"][-1] == tokenizer.eos_token_id
    assert trainer.train().global_step == 3


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_the_end_is_learnt_whatever_pads(checkpoint, tmp_path, pad):
    """A tokenizer without a padding token, and one whose padding is the EOS."""
    model, tokenizer = native_model(checkpoint, "torch")
    tokenizer.pad_token = pad
    rows = [{"text": sentence(n)} for n in range(4)]
    config = SFTConfig(str(tmp_path), **SETTINGS | {"max_steps": 1})
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    assert all(row["labels"][-1] == tokenizer.eos_token_id for row in trainer.train_dataset)
    step_batch = trainer._step_batches().batch(0)
    lengths = (step_batch.segments != 0).sum(axis=-1)
    last = np.take_along_axis(step_batch.targets, lengths[..., None] - 2, axis=-1)  # what the last but one token must predict
    assert (last == tokenizer.eos_token_id).all()
    assert trainer.train().global_step == 1


def test_gradient_checkpointing_of_the_arguments(checkpoint, tmp_path):
    trainer = small(checkpoint, tmp_path, gradient_checkpointing=True)
    assert base_of(trainer.model).engine.model.options.gradient_checkpointing == "full"
    trainer.train()


def test_padded_rows_are_cut_and_formatting_functions_work(checkpoint, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 1, 1], "attention_mask": [1, 1, 1, 1, 0], "labels": [-100, 6, 7, 1, -100]}] * 3
    trainer = small(checkpoint, tmp_path, rows=rows)
    assert trainer.examples[0].tokens.tolist() == [5, 6, 7, 1] and trainer.examples[0].learn.tolist() == [
        False,
        True,
        True,
        True,
    ]
    model, tokenizer = native_model(checkpoint, "torch")
    data = Dataset.from_list([{"a": sentence(n), "b": str(n)} for n in range(4)])

    def one(row):
        return f"{row['a']}-{row['b']}"

    def batched(rows):
        return [f"{a}-{b}" for a, b in zip(rows["a"], rows["b"], strict=True)]

    found = []
    for function in (one, batched):
        config = SFTConfig(str(tmp_path), **SETTINGS)
        made = SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, formatting_func=function)
        found.append([tokenizer.decode(example.tokens) for example in made.examples])
    assert found[0] == found[1] == [f"{sentence(n)}-{n}<eos>" for n in range(4)]


def test_packing_and_assistant_only(checkpoint, tmp_path):
    packed = small(checkpoint, tmp_path, packing=True, rows=ROWS["text"])
    packed.train()
    assert packed._run.step_batches.steps_per_epoch < 45 // 2
    answers = small(checkpoint, tmp_path, rows=ROWS["messages"], assistant_only_loss=True)
    example = answers.examples[3]
    assert answers.tokenizer.decode(example.tokens[example.learn]) == f"{sentence(3)}<eos>"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such field": ({"rows": [{"body": "x", "title": "y"}]}, {}, "its fields are: body, title"),
    "named field": ({"rows": [{"text": "x"}]}, {"dataset_text_field": "story"}, r"no field 'story'.*its fields are: text"),
    "wrong length": ({"rows": [{"input_ids": [1, 2, 3], "labels": [1, 2]}]}, {}, "labels must be as long as input_ids"),
    "no rows": ({"rows": []}, {}, "train_dataset has no rows"),
    "masked": ({"rows": [{"input_ids": [3, 4], "labels": [-100, -100]}]}, {}, "nothing is learnt from any of the 1 rows"),
    "vocabulary": ({"rows": [{"input_ids": [3, 4000]}]}, {}, "holds the token 4000, and the model has 260"),
    "both dtypes": ({}, {"fp16": True, "bf16": True}, "fp16 and bf16 are both set"),
    "optimizer": ({}, {"optim": "adafactor"}, "optim must be one of adamw_torch"),
    "plateau": ({}, {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "looks at the loss"),
    "no eval": ({}, {"eval_strategy": "steps"}, "there is no eval_dataset"),
    "by length": ({}, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, checkpoint, tmp_path):
    given, changes, message = BAD[name]
    model, tokenizer = native_model(checkpoint, "torch")
    with pytest.raises((DataError, ValueError), match=message):
        held_out = ROWS["tokens"][:2] if name == "plateau" else None
        SFTTrainer(
            model,
            args=SFTConfig(str(tmp_path), **SETTINGS | changes),
            train_dataset=given.get("rows", ROWS["tokens"]),
            eval_dataset=held_out,
            processing_class=tokenizer,
        )


WRONG_VALUES = {
    "per_device_train_batch_size": (None, 0, -1, 2.5, "2", True),
    "per_device_eval_batch_size": (0,),
    "gradient_accumulation_steps": (0, -2, 1.5),
    "max_steps": (3.7, float("nan"), True, "x"),
    "num_train_epochs": (float("nan"), "3"),
    "learning_rate": (None, -1, float("nan"), True),
    "weight_decay": (-1, float("nan")),
    "adam_beta1": (2.0, -1),
    "adam_beta2": (1.0, float("nan")),
    "adam_epsilon": (-1, 0),
    "max_grad_norm": ("1", float("nan")),
    "seed": (-1, 3.7, 10**20),
    "data_seed": (-1,),
    "save_total_limit": ("x",),
    "max_length": (-1, 3.7),
    "pad_to_multiple_of": (-1, 0, 3.7),
    "packing": ("False",),
    "completion_only_loss": ("no",),
}


def test_values_that_no_field_can_have(checkpoint, tmp_path):
    """Nothing is trained with them, nothing ends deep inside; also where the trainer itself gets them, as in TRL 0.x."""
    for kind in (SFTConfig, DPOConfig, TrainingArguments):
        check_values("defaults", TrainerValues, vars(kind(str(tmp_path))))
    model, tokenizer = native_model(checkpoint, "torch")
    given = {"train_dataset": ROWS["tokens"], "processing_class": tokenizer}
    for name, values in WRONG_VALUES.items():
        for value in values:
            args = SFTConfig(str(tmp_path), **SETTINGS)
            setattr(args, name, value)
            with pytest.raises(ValueError, match=rf"SFTConfig: {name} must be .*, got "):
                SFTTrainer(model, args=args, **given)
    with pytest.raises(ValueError, match="packing must be True or False, got 'False'"):
        SFTTrainer(model, args=SFTConfig(str(tmp_path), **SETTINGS), packing="False", **given)


def test_a_norm_below_zero_clips_nothing(checkpoint, tmp_path):
    """As in transformers; clipped to it, gradients would lead uphill."""
    assert trained_weights(checkpoint, tmp_path, -1.0) == pytest.approx(trained_weights(checkpoint, tmp_path, 0.0))


def trained_weights(checkpoint, tmp_path, norm):
    trainer = small(checkpoint, tmp_path, max_grad_norm=norm)
    trainer.train()
    return [own.sum().item() for name, own in trainer.model.named_parameters() if own.requires_grad]


def test_unknown_arguments_of_config_and_trainer(checkpoint, tmp_path):
    with pytest.raises(TypeError, match="did you mean 'learning_rate'"):
        SFTConfig(str(tmp_path), learning_rat=1.0)
    model, _ = native_model(checkpoint, "torch")
    with pytest.raises(TypeError, match="did you mean 'train_dataset'"):
        SFTTrainer(model, train_datasets=ROWS["text"])
    with pytest.raises(ValueError, match="optimizer is the backend's"):
        SFTTrainer(model, train_dataset=ROWS["text"], optimizers=(object(), None))
    with pytest.raises(ValueError, match="mlm=True"):
        collator = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
        collator.mlm = True
        SFTTrainer(model, train_dataset=ROWS["text"], data_collator=collator)
    with pytest.raises(TypeError, match="FastLanguageModel"):
        SFTTrainer(their_base(), train_dataset=ROWS["text"])
    base = FastLanguageModel.from_pretrained(checkpoint, backend="torch", max_seq_length=64)[0]
    with pytest.raises(ValueError, match="call FastLanguageModel"):
        SFTTrainer(base, args=SFTConfig(str(tmp_path), **SETTINGS), train_dataset=ROWS["text"]).train()


def test_precision_must_be_the_models(checkpoint, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, backend="torch", dtype=torch.bfloat16, max_seq_length=64)
    model = FastLanguageModel.get_peft_model(model, r=2)
    SFTTrainer(model, args=SFTConfig(str(tmp_path), bf16=True), train_dataset=ROWS["text"])
    with pytest.raises(ValueError, match="asks for float16, and the model was loaded in bfloat16"):
        SFTTrainer(model, args=SFTConfig(str(tmp_path), fp16=True), train_dataset=ROWS["text"])
