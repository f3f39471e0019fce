"""What scripts ask of a trainer beside train(): there as in transformers and TRL, or refused with the reason."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from jaxsloth import DPOConfig, DPOTrainer, FastLanguageModel, SFTConfig, SFTTrainer
from jaxsloth.backend import StepResult
from jaxsloth.frontend import arguments, dpo_config, sft_config
from jaxsloth.frontend.module.placeholders import Placeholder
from jaxsloth.frontend.saving import HubError
from jaxsloth.frontend.trainer_run import DECIDING
from jaxsloth.frontend.trainer_surface import _CALLED, _OF_ARGS, _OF_TRL, _ONCE, ABSENT, NotHereError, _theirs, refuse_overrides
from tests.support.modules import BACKENDS, TRAINING
from tests.support.native import native_model
from tests.support.tiny import WORDS, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
SETTINGS: dict[str, Any] = {**TRAINING, "max_steps": 2, "learning_rate": 5e-3, "max_length": 48}
ROWS = Dataset.from_list([{"text": " ".join(WORDS[n % 5 : n % 5 + 2 + n % 7])} for n in range(7)])
PAIRS = Dataset.from_list([{"prompt": "say ", "chosen": WORDS[n], "rejected": WORDS[n + 1]} for n in range(7)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("surface") / "model", num_hidden_layers=2))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())


def made(checkpoint: str, folder: Path, backend: str = "torch", kind: Any = SFTTrainer, **more: Any) -> Any:
    model, tokenizer = native_model(checkpoint, backend, target_modules=["q_proj", "down_proj"])
    preferring = issubclass(kind, DPOTrainer)
    args = (DPOConfig if preferring else SFTConfig)(str(folder), **SETTINGS | more.pop("settings", {}))
    return kind(model, args=args, train_dataset=PAIRS if preferring else ROWS, processing_class=tokenizer, **more)


def public(*kinds: type[Any]) -> set[str]:
    return {name for kind in kinds for name in dir(kind) if not name.startswith("_")}


# What transformers' and TRL's trainers set on themselves.
ATTRIBUTES = {
    *("args", "model", "model_wrapped", "state", "control", "callback_handler", "processing_class", "train_dataset"),
    *("eval_dataset", "compute_metrics", "optimizer", "lr_scheduler", "accelerator", "hub_model_id", "is_in_train"),
    *("compute_loss_func", "model_init", "is_model_parallel", "is_deepspeed_enabled", "is_fsdp_enabled", "label_smoother"),
    *("data_collator", "preprocess_logits_for_metrics", "optimizer_cls_and_kwargs", "current_flos", "label_names"),
}


@pytest.mark.parametrize(("ours", "theirs"), [(SFTTrainer, trl.SFTTrainer), (DPOTrainer, trl.DPOTrainer)])
def test_every_public_name_of_trls_trainer_is_had_or_refused_with_a_reason(ours, theirs, checkpoint, tmp_path):
    trainer = made(checkpoint, tmp_path, kind=ours)
    names = public(theirs) | ATTRIBUTES
    had = set()
    for name in names:
        try:
            getattr(trainer, name)
        except NotHereError as error:
            assert f"{ours.__name__} has no {name}: " in str(error) and "TRL's trainer drives this module" in str(error)
            assert name in ABSENT and not hasattr(trainer, name)
        else:
            had.add(name)
    assert had == names - set(ABSENT)
    with pytest.raises(AttributeError, match="has no attribute 'nothing_of_the_kind'") as caught:
        trainer.nothing_of_the_kind  # noqa: B018
    assert type(caught.value) is AttributeError
    # Whatever only TRL's have of their own, and a subclass could think of having.
    own = {name for kind in theirs.__mro__ if kind.__module__.startswith("trl") for name in vars(kind)}
    own = {name for name in own if callable(getattr(theirs, name)) and not name.startswith("__")}
    assert own <= set(dir(Trainer)) | _OF_TRL


@pytest.mark.parametrize(("theirs", "ours"), [(trl.SFTTrainer, SFTTrainer), (trl.DPOTrainer, DPOTrainer)])
def test_every_method_that_a_subclass_may_override_is_called_or_refused(theirs, ours):
    """All that transformers' and TRL's trainers have, and had: an override is never passed over in silence."""
    kinds = [kind for kind in theirs.__mro__ if kind is not object]
    methods = {name for kind in kinds for name, value in vars(kind).items() if inspect.isroutine(value)}
    methods = {name for name in methods | _ONCE if not name.startswith("__")}
    assert len(methods) > 100 and not methods - _CALLED - _theirs()
    for name in methods:
        own = type("Mine", (ours,), {name: lambda self, *arguments, **settings: None})
        mine = own.__new__(own)
        if name in _CALLED:
            assert refuse_overrides(mine) is None  # and test_methods_of_a_subclass_are_called
        else:
            with pytest.raises(ValueError, match=rf"Mine has its own {name}, which would never be called"):
                refuse_overrides(mine)


# What becomes of the data, the adapter and the base is in a checkpoint's other fingerprints.
FREE = {
    *("output_dir", "per_device_eval_batch_size", "num_train_epochs", "max_steps", "bf16", "fp16", "activation_checkpointing"),
    *("gradient_checkpointing", "logging_strategy", "logging_steps", "logging_first_step", "disable_tqdm", "report_to"),
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps"),
    *("eval_delay", "eval_on_start", "prediction_loss_only", "save_strategy", "save_steps", "save_total_limit"),
    *("save_only_model", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "use_cpu"),
    *("include_num_input_tokens_seen", "dataset_text_field", "dataset_num_proc", "max_length", "completion_only_loss"),
    *("assistant_only_loss", "pad_to_multiple_of", "chat_template_path", "eos_token", "max_prompt_length", "truncation_mode"),
    *("precompute_ref_log_probs", "precompute_ref_batch_size"),
}


def test_a_checkpoint_knows_every_argument_that_decides_numbers():
    used = sft_config.USED | dpo_config.USED
    assert set(DECIDING) | FREE == used and not set(DECIDING) & FREE


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer])
def test_what_only_trls_trainers_read_of_themselves_is_refused(kind, checkpoint, tmp_path):
    """All that they take from their args and read again at every step; before training and in the middle of it."""
    theirs = {SFTTrainer: trl.SFTTrainer, DPOTrainer: trl.DPOTrainer}[kind]
    source = inspect.getsource(theirs.__init__)
    taken = {name for name in re.findall(r"self\.(\w+) = (?:getattr\()?args[.,]", source) if not name.startswith("_")}
    assert taken and taken <= _OF_ARGS | {"args"}
    trainer = made(checkpoint, tmp_path, kind=kind)
    name = "beta" if kind is DPOTrainer else "padding_free"

    class Sets(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            setattr(trainer, name, 0.7)

    trainer.add_callback(Sets())
    for steps in (1, 0):
        with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name} was set, and would have no effect"):
            trainer.train()
        assert trainer.state.global_step == 1 or steps == 0


METHODS = ("compute_loss", "training_step", "create_optimizer", "create_scheduler", "get_train_dataloader")
MORE = ("prediction_step", "evaluation_loop", "_get_train_sampler", "_save_checkpoint", "_prepare_dataset", "optimizer_step")


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer])
@pytest.mark.parametrize("name", (*METHODS, *MORE))
def test_a_method_that_would_never_be_called_is_refused(name, kind, checkpoint, tmp_path):
    class Mixin:
        pass

    setattr(Mixin, name, lambda self, *arguments, **settings: None)
    own = type("Mine", (Mixin, kind), {})
    if name == "optimizer_step":  # nobody's but the user's
        assert made(checkpoint, tmp_path, kind=own).optimizer_step() is None
        return
    with pytest.raises(ValueError, match=rf"Mine has its own {name}, which would never be called.*TRL's trainer"):
        made(checkpoint, tmp_path, kind=own)
    trainer = made(checkpoint, tmp_path, kind=kind)
    setattr(trainer, name, lambda *arguments: None)
    with pytest.raises(ValueError, match=f"has its own {name}"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compute_loss_func", lambda *outputs: 0),
        ("optimizers", (1, None)),
        ("model_init", lambda: None),
        ("optimizer_cls_and_kwargs", (torch.optim.SGD, {})),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(name, value, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=rf"SFTTrainer can't take {name}="):
        made(checkpoint, tmp_path, **{name: value})


@both
@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer])
def test_methods_of_a_subclass_are_called(kind, backend, checkpoint, tmp_path):
    """log, evaluate and save_model; what the module holds there is what was trained up to then."""
    calls: list[str] = []
    seen: list[torch.Tensor] = []
    logged: list[torch.Tensor] = []

    class Mine(kind):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            calls.append("log")
            logged.append(next(own.detach().clone() for name, own in self.model.named_parameters() if "lora_B" in name))
            super().log(logs | {"mine": 1.0}, start_time)

        def evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
            calls.append("evaluate")
            return super().evaluate(*arguments, **settings)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            calls.append("save_model")
            seen.append(next(own.detach().clone() for name, own in self.model.named_parameters() if "lora_B" in name))
            (Path(str(output_dir)) / "mine.txt").write_text("mine", encoding="utf-8")

    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1}
    data = (PAIRS if kind is DPOTrainer else ROWS).select(range(2))
    trainer = made(checkpoint, tmp_path, backend, Mine, settings=settings, eval_dataset=data)
    trainer.train()
    assert calls == ["log", "save_model", "log", "evaluate", "log", "save_model", "log"]
    assert all(entry["mine"] == 1.0 for entry in trainer.state.log_history)
    assert (tmp_path / "checkpoint-2" / "mine.txt").is_file() and (tmp_path / "checkpoint-2" / "state.safetensors").is_file()
    assert seen[0].any() and not torch.equal(seen[0], seen[1])
    last = next(own for name, own in trainer.model.named_parameters() if "lora_B" in name)
    assert torch.equal(seen[1], last)
    assert torch.equal(logged[0], seen[0]) and torch.equal(logged[1], last)


@both
def test_metrics_batches_and_predictions(backend, checkpoint, tmp_path, capsys):
    trainer = made(checkpoint, tmp_path, backend, eval_dataset=ROWS.select(range(3)), compute_metrics=lambda seen: {"one": 1.0})
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == 4 and trainer.num_examples(loader) == 7
    losses = [float(trainer.model(**batch).loss) for batch in batches[:2]]
    done = trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(losses[0], abs=1e-5)
    assert trainer.get_learning_rates() == [0.0, 0.0] and trainer.is_world_process_zero() and trainer.is_local_process_zero()
    trained = sum(own.numel() for own in trainer.model.parameters() if own.requires_grad)
    assert trainer.get_num_trainable_parameters() == trained > 0
    trainer.log_metrics("train", done.metrics)
    assert "***** train metrics *****" in capsys.readouterr().out
    trainer.save_metrics("train", done.metrics)
    trainer.save_state()
    assert json.loads((tmp_path / "train_results.json").read_text())["train_loss"] == done.training_loss
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2
    evaluated = trainer.evaluate()
    found = trainer.predict(ROWS.select(range(3)))
    assert found.metrics["test_loss"] == pytest.approx(evaluated["eval_loss"], abs=1e-6) and found.metrics["test_one"] == 1.0
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"]).logits.numpy()
    assert np.abs(found.predictions[:2, : logits.shape[1]][0, 0] - logits[0, 0]).max() < 1e-5
    assert found.label_ids.shape[0] == 3


def test_cards_and_the_hub(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trainer = made(checkpoint, tmp_path / "tuned")
    assert trainer.hub_model_id == "tuned"
    trainer.create_model_card(model_name="Tuned", dataset_name="poems", tags=["small"])
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert "model_name: Tuned" in card and "- poems" in card and "- small" in card and "- jaxsloth" in card
    with pytest.raises(HubError, match="tuned could not be written on the Hugging Face hub"):
        trainer.push_to_hub()


def test_a_run_whose_every_step_fp16_skips_still_logs(checkpoint, tmp_path, monkeypatch):
    """As in transformers the losses of skipped steps count where they are finite."""
    floats = StepResult.floats
    expected = [entry["loss"] for entry in trained_history(made(checkpoint, tmp_path, settings={"learning_rate": 0.0}))]
    for loss in (None, float("inf")):
        monkeypatch.setattr(StepResult, "floats", lambda self, own=loss: (own or floats(self)[0], float("inf"), True))
        found = [entry["loss"] for entry in trained_history(made(checkpoint, tmp_path, settings={"learning_rate": 0.0}))]
        assert len(found) == 2 and (found == expected if loss is None else np.isnan(found).all())


def trained_history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_data_given_later_is_trained(checkpoint, tmp_path):
    trainer = made(checkpoint, tmp_path)
    trainer.train_dataset = ROWS.select(range(2))
    trainer.eval_dataset = ROWS.select(range(1))
    assert len(trainer.train_dataset) == 2 and len(trainer.get_train_dataloader()) == 1 and "eval_loss" in trainer.evaluate()
    trainer.model = trainer.model
    other, preferring = made(checkpoint, tmp_path), made(checkpoint, tmp_path, kind=DPOTrainer)
    for mine, name in ((trainer, "model"), (preferring, "model"), (preferring, "ref_model")):
        with pytest.raises(ValueError, match=rf"trainer\.{name} can't be replaced by another model"):
            setattr(mine, name, other.model)


def held(model: Any) -> dict[str, Any]:
    """What a change of adapters that fails must leave alone."""
    parts = {
        name: (id(p), p.requires_grad, None if isinstance(p, Placeholder) else p.detach().clone())
        for name, p in model.named_parameters()
    }
    modules = {name: type(module) for name, module in model.named_modules()}
    named = {"configs": list(getattr(model, "peft_config", {})), "active": getattr(model, "active_adapter", None)}
    return {"parts": parts, "modules": modules, **named}


def assert_held(model: Any, before: dict[str, Any]) -> None:
    now = held(model)
    assert {k: v for k, v in now.items() if k != "parts"} == {k: v for k, v in before.items() if k != "parts"}
    assert now["parts"].keys() == before["parts"].keys()
    for name, (number, flag, value) in before["parts"].items():
        assert now["parts"][name][:2] == (number, flag), name
        assert value is None or torch.equal(now["parts"][name][2], value), name


def spoilt(folder: Path) -> Path:
    """The adapter saved in a folder, with a NaN in its last tensor."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_of_adapters_that_fails_changes_nothing(backend, checkpoint, tmp_path):
    """A model that PEFT itself wrapped, with a task and without one, as FastLanguageModel's: it also saves in the format that
    is asked for."""
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, backend=backend, load_in_4bit=False, max_seq_length=64)
    bare = held(model)
    with pytest.raises(ValueError, match="use_dora"):
        SFTTrainer(
            model,
            args=SFTConfig(str(tmp_path), **SETTINGS),
            train_dataset=ROWS,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
        )
    assert_held(model, bare)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(wrapped, peft.PeftModel) and not isinstance(wrapped, peft.PeftModelForCausalLM)
    wrapped.save_pretrained(str(tmp_path / "merged"), save_format="merged_16bit")
    assert (tmp_path / "merged" / "model.safetensors").is_file() and (tmp_path / "merged" / "config.json").is_file()
    wrapped.unload()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="save_format must be one of"):
        wrapped.save_pretrained(str(tmp_path / "bad"), save_format="merged_3bit")
    wrapped.save_pretrained(str(tmp_path / "first"))
    wrapped.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.save_pretrained(str(tmp_path / "saved"), selected_adapters=["other"])
    before, logits = held(wrapped), wrapped(torch.arange(2, 9)[None]).logits
    changes: list[tuple[Any, type[Exception], str]] = [
        (lambda: wrapped.load_adapter(spoilt(tmp_path / "first"), "fresh"), ValueError, "must hold finite values"),
        (lambda: wrapped.load_adapter(tmp_path / "first", "fresh", is_trainable=True), ValueError, "must hold finite values"),
        (lambda: wrapped.load_adapter(tmp_path / "first", "default"), ValueError, "must hold finite values"),
        (lambda: wrapped.load_adapter(tmp_path / "saved" / "other", "default"), RuntimeError, "size mismatch"),
        (lambda: wrapped.add_adapter("fresh", peft.LoraConfig(target_modules=["q_proj", "norm"])), ValueError, "supported"),
        (lambda: wrapped.set_adapter("nobody"), ValueError, "not found"),
    ]
    for change, kind, message in changes:
        with pytest.raises(kind, match=message):
            change()
        assert_held(wrapped, before)
    assert torch.equal(wrapped(torch.arange(2, 9)[None]).logits, logits)


def test_a_hook_around_the_blocks_is_refused_by_training(checkpoint, tmp_path):
    trainer = made(checkpoint, tmp_path)
    trainer.model.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match="has a hook, which this trainer would never call"):
        trainer.train()
