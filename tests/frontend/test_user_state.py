"""What the user's code does to the model before and during native training counts as it does in TRL: losses and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

from jaxsloth import DPOConfig, DPOTrainer, FastLanguageModel, SFTConfig, SFTTrainer
from jaxsloth.frontend import arguments
from tests.support.modules import BACKENDS, TRAINING
from tests.support.native import logged, native_model, under_their_peft
from tests.support.sources import transformers_model
from tests.support.tiny import CONFIG, WORDS, random_weights, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
BAR = 1e-5
SETTINGS: dict[str, Any] = {**TRAINING, "max_steps": 4, "learning_rate": 5e-3, "max_length": 48}
THEIRS: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
ROWS = [{"text": " ".join(WORDS[n % 5 : n % 5 + 2 + n % 7])} for n in range(12)]
PAIRS = [{"prompt": f"say {n} ", "chosen": WORDS[n % 9], "rejected": " ".join(WORDS[n % 5 : n % 5 + 2])} for n in range(12)]
IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("state") / "model", num_hidden_layers=2))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())


def freeze(model: Any, part: str) -> None:
    for name, parameter in model.named_parameters():
        if part in name and "lora" in name:
            parameter.requires_grad_(False)


def answers(model: Any) -> None:
    model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False)


def without_adapter(model: Any, step: int) -> None:
    with model.disable_adapter():
        answers(model)


def with_another(model: Any, step: int) -> None:
    model.set_adapter("other")
    answers(model)
    model.set_adapter("default")


def halved(model: Any, step: int) -> None:
    for name, parameter in model.named_parameters():
        if step == 2 and "lora_B" in name:
            parameter.data.mul_(0.5)


def averaged(model: Any, step: int) -> None:
    with torch.no_grad():
        pairs = [parameter for name, parameter in model.named_parameters() if "lora_A" in name and "q_proj" in name]
        for parameter in pairs:
            parameter.copy_((pairs[0] + pairs[1]) / 2)


def freezing(model: Any, step: int) -> None:
    if step == 2:
        freeze(model, "layers.1.")


def scale(model: Any, by: float) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = by


def undropped(model: Any, step: int) -> None:
    """The rate of the model's dropout is 0 from the first step on."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" in name:
            module.p = 0.0


def other_rates(args: Any, optimizer: Any, step: int) -> None:
    """A written lr is the next step's."""
    for group in optimizer.param_groups:
        group["lr"] *= (3.0, 0.1)[step % 2]


def other_arguments(args: Any, optimizer: Any, step: int) -> None:
    """The rate was chosen when the run began; the norm counts at every step."""
    args.learning_rate, args.max_grad_norm = 0.5, 0.02 * step


@dataclass(frozen=True)
class Case:
    """before: done to the model; during: done in a callback's on_step_end (at_first: in its on_train_begin), and told: to the
    arguments and the optimizer. others: a second adapter of this rank; settings: of the adapter."""

    before: Callable[[Any], None] | None = None
    during: Callable[[Any, int], None] | None = None
    at_first: bool = False
    told: Callable[[Any, Any, int], None] | None = None
    others: int | None = None
    trainer: str = "SFT"
    settings: tuple[tuple[str, Any], ...] = ()


CASES = {
    "lora_A is frozen": Case(before=lambda model: freeze(model, "lora_A")),
    "layer 0 is frozen": Case(before=lambda model: freeze(model, "layers.0.")),
    "frozen on the way": Case(during=freezing),
    "answers without the adapter": Case(during=without_adapter),
    "answers with another adapter": Case(during=with_another, others=4),
    "answers with one of another rank": Case(during=with_another, others=2),
    "weights are halved": Case(during=halved),
    "weights are averaged": Case(during=averaged),
    "scaled before": Case(before=lambda model: scale(model, 0.5)),
    "scaled on the way": Case(during=lambda model, step: scale(model, (0.0, 8.0, 1)[step % 3])),
    "never dropped": Case(during=undropped, at_first=True, settings=(("lora_dropout", 0.4),)),
    "rates are written": Case(told=other_rates),
    "arguments are written": Case(told=other_arguments),
    "dpo, scaled on the way": Case(during=lambda model, step: scale(model, 5.0), trainer="DPO"),
    "dpo, answers without the adapter": Case(during=without_adapter, trainer="DPO"),
    "dpo, weights are halved": Case(during=halved, trainer="DPO"),
}


class Does(TrainerCallback):
    def __init__(
        self,
        what: Callable[[Any, int], None] | None,
        at_first: bool = False,
        told: Callable[[Any, Any, int], None] | None = None,
    ) -> None:
        self._what, self._at_first, self._told = what, at_first, told

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **others: Any) -> None:
        if self._at_first and self._what:
            self._what(model, 0)

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        if self._what and not self._at_first:
            self._what(model, state.global_step)
        assert lr_scheduler.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
        if self._told:
            self._told(args, optimizer, state.global_step)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: own.detach().clone() for name, own in model.named_parameters() if "lora" in name}


def another(model: Any, rank: int) -> None:
    model.add_adapter("other", peft.LoraConfig(r=rank, lora_alpha=6, task_type="CAUSAL_LM", **TARGETS))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def ran(case: Case, model: Any, tokenizer: Any, folder: Path, ours: bool) -> tuple[np.ndarray, dict[str, torch.Tensor], Any]:
    """(losses, how far every weight went, the trainer)."""
    if case.others:
        another(model, case.others)
    if case.before:
        case.before(model)
    before = weights(model)
    native, judges = {"SFT": (SFTTrainer, trl.SFTTrainer), "DPO": (DPOTrainer, trl.DPOTrainer)}[case.trainer]
    configs = {"SFT": (SFTConfig, trl.SFTConfig), "DPO": (DPOConfig, trl.DPOConfig)}[case.trainer]
    trainer: Any = (native if ours else judges)(
        model,
        args=configs[not ours](str(folder), **SETTINGS, **({} if ours else THEIRS)),
        train_dataset=Dataset.from_list(ROWS if case.trainer == "SFT" else PAIRS),
        processing_class=tokenizer,
        callbacks=[Does(case.during, case.at_first, case.told)] if case.during or case.told else None,
    )
    trainer.train()
    moved = {name: own - before[name] for name, own in weights(model).items() if name in before}
    return logged(trainer.state.log_history, "loss"), moved, trainer


@pytest.fixture(scope="module")
def judges_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("judge")


def theirs(checkpoint: str, **settings: Any) -> tuple[Any, Any]:
    ours, tokenizer = native_model(checkpoint, "torch", **TARGETS, **settings)
    config = CONFIG | {"num_hidden_layers": 2}
    return under_their_peft(ours, transformers_model(config, random_weights(config, 0))), tokenizer


@cache
def judged(name: str, checkpoint: str, folder: Path) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    return ran(CASES[name], *theirs(checkpoint, **dict(CASES[name].settings)), folder, ours=False)[:2]


def assert_moved_alike(ours: dict[str, torch.Tensor], judge: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == judge.keys()
    for name, expected in judge.items():
        assert torch.linalg.norm(ours[name] - expected) <= 2e-3 * torch.linalg.norm(expected), name


FIRST = ("lora_A is frozen", "answers with one of another rank", "weights are halved", "dpo, answers without the adapter")


# What the backend takes no part in: other cases change the same of it.
ON_TORCH = ("layer 0 is frozen", "rates are written", "arguments are written")


# On JAX, where each compiles its step anew, the rest is slow.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=() if backend == "torch" or name in FIRST else pytest.mark.slow)
        for name in CASES
        for backend in BACKENDS
        if backend == "torch" or name not in ON_TORCH
    ],
)
def test_what_the_user_does_counts_as_in_trl(name, backend, checkpoint, tmp_path, judges_folder):
    losses, moved = judged(name, checkpoint, judges_folder)
    model, tokenizer = native_model(checkpoint, backend, **TARGETS, **dict(CASES[name].settings))
    found, ours, trainer = ran(CASES[name], model, tokenizer, tmp_path, ours=True)
    assert len(found) == 4 and np.ptp(losses) > 0.01
    assert np.abs(found - losses).max() < BAR
    assert_moved_alike(ours, moved)
    assert any(step.any() for step in ours.values())
    if "frozen" in name:
        assert any(not step.any() for step in ours.values()) or "way" in name
    if CASES[name].others:
        assert not any(step.any() for part, step in ours.items() if ".other." in part)
    # The backend ends with what the module holds.
    assert trainer.base.shared is None


@both
def test_a_second_train_goes_on_with_the_optimizer(backend, checkpoint, tmp_path):
    """Adam's moments and its count, as transformers' Trainer keeps its optimizer."""
    judge, tokenizer = theirs(checkpoint)
    ours, _ = native_model(checkpoint, backend, **TARGETS)
    data = Dataset.from_list(ROWS)
    settings = SETTINGS | {"lr_scheduler_type": "constant"}
    made: list[Callable[[], Any]] = [  # one after the other: arguments made in between reset what accelerate knows
        lambda: trl.SFTTrainer(
            judge, args=trl.SFTConfig(str(tmp_path), **settings, **THEIRS), train_dataset=data, processing_class=tokenizer
        ),
        lambda: SFTTrainer(ours, args=SFTConfig(str(tmp_path), **settings), train_dataset=data, processing_class=tokenizer),
    ]
    losses, moved = [], []
    for make in made:
        trainer = make()
        before = weights(trainer.model)
        found = []
        for _ in range(2):
            trainer.train()
            found.append(logged(trainer.state.log_history, "loss"))
        losses.append(np.concatenate(found))
        moved.append({name: own - before[name] for name, own in weights(trainer.model).items()})
    assert len(losses[1]) == 8
    assert np.abs(losses[1] - losses[0]).max() < BAR
    assert_moved_alike(moved[1], moved[0])


def trainer_of(model: Any, tokenizer: Any, folder: Path, **more: Any) -> SFTTrainer:
    callbacks = more.pop("callbacks", None)
    data = Dataset.from_list(ROWS)
    args = SFTConfig(str(folder), **SETTINGS | more)
    return SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)


@both
def test_what_is_frozen_altogether_is_not_trained(backend, checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, backend, **TARGETS)
    model.save_pretrained(str(tmp_path / "adapter"))
    base, _ = FastLanguageModel.from_pretrained(checkpoint, backend=backend, load_in_4bit=False, max_seq_length=64)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=False)
    with pytest.raises(ValueError, match=r"nothing of the active adapter requires a gradient.*is_trainable=True"):
        trainer_of(model, tokenizer, tmp_path).train()


LEFT = {
    "another is active": lambda model: model.set_adapter("other"),
    "it is disabled": lambda model: model.base_model.disable_adapter_layers(),
    "it is deleted": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
}


@both
@pytest.mark.parametrize("name", LEFT)
def test_another_adapter_left_active_ends_the_run(name, backend, checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, backend, **TARGETS)
    another(model, 4)
    callbacks = [Does(lambda model, step: LEFT[name](model) if step == 2 else None)]
    trainer = trainer_of(model, tokenizer, tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"must be active when a step begins.*lora_A.weight is not the same any more"):
        trainer.train()
    assert trainer.state.global_step == 2


def scaled_apart(model: Any, optimizer: Any) -> None:
    next(module for module in model.modules() if hasattr(module, "lora_A")).scaling["default"] = 7.0


WRITTEN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "one layer's scaling": (scaled_apart, r"adapters must have one rank, alpha and dropout here"),
    "a scaling of NaN": (lambda model, optimizer: scale(model, float("nan")), "scaling must be a finite number"),
    "decay": (
        lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
        r"weight_decay was 0\.1 when train\(\) began and is 0\.5; of a group only its lr",
    ),
    "a rate of NaN": (lambda model, optimizer: optimizer.param_groups[0].update(lr=float("nan")), "got nan"),
    "another group": (lambda model, optimizer: optimizer.add_param_group({"params": []}), "a group can't be added"),
    "a step": (lambda model, optimizer: optimizer.step(), "steps are the backend's"),
    "moments": (lambda model, optimizer: optimizer.state_dict(), "moments are the backend's"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_can_not_be_written_in_a_callback_ends_the_run(name, checkpoint, tmp_path):
    """Above the backends: what they are given is tested with what can be written."""
    what, message = WRITTEN[name]

    class Writes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any) -> None:
            what(model, optimizer)

    model, tokenizer = native_model(checkpoint, "torch", **TARGETS)
    trainer = trainer_of(model, tokenizer, tmp_path, callbacks=[Writes()])
    assert trainer.optimizer is None and trainer.lr_scheduler is None
    with pytest.raises((ValueError, RuntimeError, AttributeError), match=message):
        trainer.train()
    with pytest.raises(ValueError, match=r"trainer\.optimizer can't be set"):
        trainer.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])


@both
def test_what_is_thawed_on_the_way_is_refused_or_named(backend, checkpoint, tmp_path):
    def thaws(model: Any, step: int) -> None:
        for parameter in (own for name, own in model.named_parameters() if "lora_A" in name):
            parameter.requires_grad_(step != 1)

    model, tokenizer = native_model(checkpoint, backend, **TARGETS)
    with pytest.raises(ValueError, match="was frozen for some steps and requires a gradient again"):
        trainer_of(model, tokenizer, tmp_path, callbacks=[Does(thaws)]).train()
    model, _ = native_model(checkpoint, backend, **TARGETS)
    freeze(model, "lora_A")
    before = weights(model)
    with pytest.warns(UserWarning, match=r"\(4 in all\) requires a gradient now and did not"):
        trainer_of(model, tokenizer, tmp_path, callbacks=[Does(without_adapter)]).train()  # PEFT's context thaws them
    moved = {name: own - before[name] for name, own in weights(model).items()}
    assert all(step.any() == ("lora_B" in name) for name, step in moved.items())


@both
def test_modules_trained_whole_can_be_frozen(backend, checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, backend, **TARGETS, modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(False)
    before = {name: own.detach().clone() for name, own in model.named_parameters() if "modules_to_save" in name}
    trainer = trainer_of(model, tokenizer, tmp_path)
    trainer.train()
    assert before and all(torch.equal(own, before[name]) for name, own in model.named_parameters() if name in before)
    assert any(own.any() for name, own in weights(model).items() if "lora_B" in name)


@both
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_frozen_tensors_of_many_values_do_not_decay(optim, backend, tmp_path):
    """4096 values and more, which 8-bit AdamW keeps in blocks."""
    checkpoint = str(write_checkpoint(tmp_path / "model", num_hidden_layers=2))
    model, tokenizer = native_model(checkpoint, backend, target_modules=["down_proj"], r=64)
    freeze(model, "layers.0.")
    before = weights(model)
    trainer_of(model, tokenizer, tmp_path, optim=optim, max_steps=2).train()
    assert max(own.numel() for own in before.values()) >= 4096
    for name, own in weights(model).items():
        assert torch.equal(own, before[name]) == ("layers.0." in name), name


def test_a_gradient_hook_is_refused_and_asked_gradients_are_named(checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, "torch", **TARGETS)

    class Watches(TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: Any, **others: Any) -> None: ...

    with pytest.warns(UserWarning, match=r"Watches.on_pre_optimizer_step is called, but parameters have no .grad"):
        trainer_of(model, tokenizer, tmp_path, callbacks=[Watches()]).train()
    next(own for own in model.parameters() if own.requires_grad).register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(ValueError, match="has a gradient hook, which would never be called"):
        trainer_of(model, tokenizer, tmp_path).train()


@both
def test_the_best_is_loaded_where_there_is_one(backend, checkpoint, tmp_path, monkeypatch):
    """The best evaluation's step has no checkpoint, or eval_on_start saw the best: as in transformers."""
    model, tokenizer = native_model(checkpoint, backend, **TARGETS)
    values = iter([0.0, 3.0, 1.0, 2.0, 4.0])

    class Falls(SFTTrainer):
        def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
            found = super().evaluate(*arguments, **settings)
            return found | {"eval_score": next(values)}

    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_evaluate, control.should_save = True, state.global_step in (1, 4)

    args = SFTConfig(
        str(tmp_path),
        **SETTINGS | {"save_strategy": "steps", "save_steps": 4},
        eval_strategy="steps",
        eval_steps=4,
        eval_on_start=True,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
    )
    rows = Dataset.from_list(ROWS)
    trainer = Falls(
        model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=tokenizer,
        callbacks=[Asks()],
    )
    trainer.train()
    # The start's 0 does not count; step 2 is the best, and has no checkpoint: step 1's is the best that there is.
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    saved = peft.load_peft_weights(str(tmp_path / "checkpoint-1"))
    own = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(own[name], value) for name, value in saved.items())


@both
def test_the_best_of_a_run_that_was_moved(backend, checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, backend, **TARGETS)
    rows = Dataset.from_list(ROWS)

    def trainer(folder: Path, steps: int) -> SFTTrainer:
        settings = SETTINGS | {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
        args = SFTConfig(str(folder), **settings, **best, greater_is_better=False, metric_for_best_model="loss")
        return SFTTrainer(model, args=args, train_dataset=rows, eval_dataset=rows.select([0]), processing_class=tokenizer)

    trainer(tmp_path / "first", 4).train()
    (tmp_path / "first").rename(tmp_path / "moved")
    again = trainer(tmp_path / "second", 6)
    with pytest.warns(UserWarning, match="best checkpoint of the resumed run, .*first.checkpoint-2, is gone"):
        again.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-4"))
    assert again.state.global_step == 6


BEST = {"SFT": "mean_token_accuracy", "DPO": "eval_logits/chosen"}


@cache
def judged_evaluations(kind: str, checkpoint: str, folder: Path) -> dict[str, float]:
    return evaluated(kind, *theirs(checkpoint), folder, "loss", ours=False)[1]


def evaluated(kind: str, model: Any, tokenizer: Any, folder: Path, best: str, ours: bool) -> tuple[Any, dict[str, float]]:
    """(the trainer after a run of two steps, what its evaluation of two data sets found)."""
    rows = Dataset.from_list(ROWS if kind == "SFT" else PAIRS)
    trainers = {"SFT": (SFTTrainer, trl.SFTTrainer), "DPO": (DPOTrainer, trl.DPOTrainer)}[kind]
    configs = {"SFT": (SFTConfig, trl.SFTConfig), "DPO": (DPOConfig, trl.DPOConfig)}[kind]
    settings = SETTINGS | {"max_steps": 2, "per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2}
    chosen = {"metric_for_best_model": best} if ours else {}
    trainer: Any = trainers[not ours](
        model,
        args=configs[not ours](str(folder), **settings, **chosen, **({} if ours else THEIRS)),
        train_dataset=rows,
        eval_dataset={"a": rows.select(range(3)), "b": rows.select(range(4, 9))},
        processing_class=tokenizer,
    )
    trainer.train()
    found = {}
    for entry in trainer.state.log_history:
        data_set = next((own for own in "ab" if f"eval_{own}_loss" in entry), None)
        if data_set is not None:
            found |= {f"{data_set}: {name}": value for name, value in entry.items() if "preparation" not in name}
    return trainer, found


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_evaluations_of_several_data_sets_are_trls(kind, backend, checkpoint, tmp_path, judges_folder):
    """The metrics that TRL makes of logits among them, where the best checkpoint is chosen by one."""
    expected = judged_evaluations(kind, checkpoint, judges_folder)
    model, tokenizer = native_model(checkpoint, backend, **TARGETS)
    trainer, found = evaluated(kind, model, tokenizer, tmp_path, BEST[kind], ours=True)
    best = "eval_" + BEST[kind].removeprefix("eval_")
    assert expected.keys() == found.keys() and {"a: eval_a_loss", f"b: {best}"} <= found.keys()
    for name, value in expected.items():
        if "per_second" not in name and "runtime" not in name:
            assert found[name] == pytest.approx(value, abs=2e-5), name
    assert trainer.state.best_metric == found[f"b: {best}"] != found[f"a: {best}"]
    again = trainer.evaluate()
    assert again["eval_a_loss"] == found["a: eval_a_loss"] != trainer.evaluate("b", metric_key_prefix="own")["own_loss"]
    assert again[best] == found[f"b: {best}"]  # TRL's own metrics are called alike for every data set
    assert len(trainer.get_eval_dataloader("b").dataset) == len(trainer.eval_dataset["b"]) == 5
    assert trainer.evaluate({"c": ROWS[:3] if kind == "SFT" else PAIRS[:3]})["eval_c_loss"] == found["a: eval_a_loss"]
    for wrong, message in (("d", r"name one of the trainer's own \(a, b\), got 'd'"), ({}, "got none")):
        with pytest.raises(ValueError, match=message):
            trainer.get_eval_dataloader(wrong)
    with pytest.raises(ValueError, match="several data sets to evaluate on, so name one: a, b"):
        trainer.get_eval_dataloader()
    trainer.args.metric_for_best_model = "loss"
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'loss', and evaluations here have: a_loss, .*b_loss"):
        trainer.train()
