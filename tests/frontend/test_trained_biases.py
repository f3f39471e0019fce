"""The base's biases trained beside the adapters (LoRA's bias="all" and "lora_only"), against transformers, PEFT and TRL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxsloth import DPOConfig, DPOTrainer, FastLanguageModel, SFTConfig, SFTTrainer
from jaxsloth.frontend.adapters import base_of
from jaxsloth.frontend.module.placeholders import PlaceholderBias
from tests.support.modules import (
    BACKENDS,
    TRAINING,
    adapted,
    assert_same_passes,
    batch,
    logits,
    losses_of_a_loop,
    moved,
    our_base,
    trained,
)
from tests.support.native import logged, native_model, under_their_peft
from tests.support.sources import transformers_model
from tests.support.tiny import CONFIG, byte_tokenizer, random_weights, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
BIASED = {"attention_bias": True, "mlp_bias": True}
PLACES = {"all": 28, "lora_only": 8}  # biases that TARGETS' setting trains
TARGETS = ["q_proj", "down_proj"]
# epsilon: gradients of biases are near zero here and there, and Adam would blow their rounding up to whole steps.
SETTINGS: dict[str, Any] = {**TRAINING, "max_steps": 5, "learning_rate": 2e-2, "adam_epsilon": 1e-3, "max_length": 64}
JUDGES: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
ROWS = [{"input_ids": np.random.default_rng(n).integers(2, CONFIG["vocab_size"], 8 + 3 * (n % 9)).tolist()} for n in range(12)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("biased") / "model", **BIASED))


def their_base() -> Any:
    return transformers_model(CONFIG | BIASED, random_weights(CONFIG | BIASED, 0))


def pair(backend: str, **settings: Any) -> tuple[Any, Any]:
    own = {"target_modules": TARGETS} | settings
    return adapted(our_base(backend, **BIASED), **own), adapted(their_base(), **own)


def biases(model: Any) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if name.endswith(".bias") and p.requires_grad]


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], bar: float) -> None:
    assert left.keys() == right.keys() and any(name.endswith(".bias") for name in left)
    for name, value in right.items():
        assert (left[name] - value).norm() < bar * value.norm(), name


@both
@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only", "layers_to_transform": [0, 2]}], ids=str)
def test_passes_of_the_module_are_pefts(backend, settings):
    """In the second case some blocks of a stack train a bias that the others leave as it is."""
    ours, theirs = pair(backend, **settings)
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    assert len(biases(ours)) == {"all": 28, "lora_only": 4}[settings["bias"]]
    assert all(map(torch.equal, biases(ours), biases(theirs)))
    rows = batch()
    real = rows["attention_mask"].bool()
    moved(ours, ".bias", 0.2), moved(theirs, ".bias", 0.2)
    scores = (
        lambda model: model(**rows).loss,
        lambda model: model(**rows).logits[real].logsumexp(-1).sum(),
        lambda model: model.get_base_model().model(rows["input_ids"], rows["attention_mask"]).last_hidden_state[real].sum(),
    )
    assert assert_same_passes(ours, theirs, scores).keys() == trained(theirs).keys()
    with pytest.warns(UserWarning, match="does not produce the same output"), ours.disable_adapter():
        off = logits(ours)
    with theirs.disable_adapter():
        torch.testing.assert_close(off, logits(theirs), rtol=0, atol=1e-5)
    assert (off - logits(their_base())).abs().max() > 1e-2  # PEFT leaves the base's biases as they were trained


@both
def test_a_loop_of_ones_own(backend):
    """An optimizer made right away; it writes the biases in place, where a backend has read them, right after a pass."""

    def run(model: Any) -> list[float]:
        return losses_of_a_loop(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2), 6)

    ours, theirs = pair(backend, bias="all", target_modules=["v_proj"])
    expected = run(theirs)
    assert run(ours) == pytest.approx(expected, abs=2e-5) and expected[-1] < expected[0] - 0.5
    stale = ours(**batch())
    with torch.no_grad():
        biases(ours)[0].add_(1.0)
    with pytest.raises(RuntimeError, match="adapters were written"):
        _ = stale.logits


@both
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_native_training_is_trls_and_peft_reads_what_is_saved(backend, bias, checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, backend, target_modules=TARGETS, bias=bias)
    before = logits(model)
    theirs = under_their_peft(model, their_base())
    args = trl.SFTConfig(str(tmp_path / "judge"), **SETTINGS | JUDGES)
    data = Dataset.from_list(ROWS)
    judge = trl.SFTTrainer(theirs, args=args, train_dataset=data, processing_class=tokenizer)
    judge.train()
    trainer = SFTTrainer(model, args=SFTConfig(str(tmp_path / "ours"), **SETTINGS), train_dataset=ROWS)
    trainer.train()
    losses = logged(judge.state.log_history, "loss")
    assert np.abs(logged(trainer.state.log_history, "loss") - losses).max() < 1e-5 and np.ptp(losses) > 0.2
    assert_close(trained(model), trained(theirs), 1e-4)
    assert len(biases(model)) == PLACES[bias]

    model.save_pretrained(tmp_path / "peft")
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained_merged(tmp_path / "lora", save_method="lora")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "peft", "lora")]
    for file in files[1:]:
        assert {n: (v.shape, v.dtype) for n, v in file.items()} == {n: (v.shape, v.dtype) for n, v in files[0].items()}
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    for name in ("peft", "lora"):
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / name))
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-4)
        again, _ = FastLanguageModel.from_pretrained(str(tmp_path / name), backend=backend, load_in_4bit=False)
        assert torch.equal(logits(again), expected) and trained(again).keys() == trained(model).keys()
    frozen = peft.PeftModel.from_pretrained(our_base(backend, **BIASED), str(tmp_path / "peft"))
    torch.testing.assert_close(logits(frozen), expected, rtol=0, atol=1e-5)
    assert_answers(model, theirs)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    with model.disable_adapter():
        model.save_pretrained_merged(tmp_path / "off", tokenizer)
    off = copy.deepcopy(theirs).unload()  # PEFT's base keeps the biases
    for folder, judged in (("merged", theirs.merge_and_unload()), ("off", off)):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert saved.keys() == judged.state_dict().keys()
        for name, value in judged.state_dict().items():
            torch.testing.assert_close(saved[name].float(), value, rtol=2**-8, atol=1e-4)


def assert_answers(model: Any, theirs: Any) -> None:
    """Cached decoding, with the adapter and without, and what comes of training after it."""
    prompt: dict[str, Any] = {"input_ids": batch((12, 12))["input_ids"]}
    prompt |= {"attention_mask": torch.ones_like(prompt["input_ids"]), "max_new_tokens": 8, "do_sample": False}
    theirs.eval()
    FastLanguageModel.for_inference(model)

    def answers(asked: Any) -> torch.Tensor:
        return asked.generate(**prompt, pad_token_id=1)

    assert torch.equal(answers(model), answers(theirs))
    with model.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(answers(model), answers(theirs))
        torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)
    assert torch.equal(answers(model), answers(theirs))


@both
@pytest.mark.parametrize("trainer", ["sft", "transformers"])
def test_trainers_of_others(backend, trainer, tmp_path):
    def run(model: Any) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in ROWS])
        if trainer == "sft":
            args = trl.SFTConfig(str(tmp_path), **SETTINGS | JUDGES)
            made: Any = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=byte_tokenizer())
        else:
            own = {name: value for name, value in SETTINGS.items() if name != "max_length"}
            args = transformers.TrainingArguments(str(tmp_path), **own | JUDGES)
            collator = transformers.DataCollatorForSeq2Seq(byte_tokenizer())
            made = transformers.Trainer(model, args=args, train_dataset=data, data_collator=collator)
        made.train()
        return logged(made.state.log_history, "loss"), trained(model)

    both_ends = ["embed_tokens", "lm_head"] if trainer == "sft" else None
    models = pair(backend, bias="all" if trainer == "sft" else "lora_only", modules_to_save=both_ends)
    (losses, weights), (expected, judged) = map(run, models)
    assert np.abs(losses - expected).max() < 1e-4 and np.ptp(expected) > 0.1  # logged losses are rounded
    assert_close(weights, judged, 1e-4)


@both
def test_biases_that_are_not_trained_hold_nothing_and_change_nothing(backend):
    base = our_base(backend, **BIASED)
    twin = copy.deepcopy(base)
    model = adapted(base, bias="none")
    placeholders = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert len(placeholders) == 28 and all(
        type(p) is PlaceholderBias and p.untyped_storage().nbytes() == 4 for p in placeholders
    )
    assert not base_of(model).prepare(batch()["input_ids"], None, None).active.full_weights
    with pytest.raises(RuntimeError, match="can't be written"), torch.no_grad():
        placeholders[0].add_(1.0)
    expected = logits(twin)
    moved(adapted(twin, bias="lora_only"), ".bias", 0.2)
    assert type(placeholders[0]) is PlaceholderBias
    copied = copy.deepcopy(twin)
    with torch.no_grad():
        before = logits(copied)
        for name, p in copied.named_parameters():
            if name.endswith(".bias") and p.requires_grad:
                p.zero_()
    assert (before - expected).abs().max() > 1e-2 and not torch.equal(logits(copied), before)
    assert torch.equal(logits(twin), before)


@both
def test_dpo_compares_with_another_model_only(backend, checkpoint, tmp_path):
    pairs = [{"prompt": f"say {n} ", "chosen": "duck " * (1 + n % 3), "rejected": "eggs " * (1 + n % 2)} for n in range(12)]
    settings = SETTINGS | {"learning_rate": 2e-3}
    model, tokenizer = native_model(checkpoint, backend, bias="all")
    ours: Any = {"args": DPOConfig(str(tmp_path / "ours"), **settings), "train_dataset": pairs}
    with pytest.raises(ValueError, match=r"bias='all' trains the base's own biases.* give ref_model"):
        DPOTrainer(model, **ours)
    judge = trl.DPOTrainer(
        under_their_peft(model, their_base()),
        ref_model=their_base(),
        args=trl.DPOConfig(str(tmp_path / "judge"), **settings | JUDGES),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    judge.train()
    reference, _ = FastLanguageModel.from_pretrained(checkpoint, backend=backend, load_in_4bit=False)
    trainer = DPOTrainer(model, reference, **ours)
    trainer.train()
    expected = logged(judge.state.log_history, "loss")
    assert logged(trainer.state.log_history, "loss") == pytest.approx(expected, abs=2e-5) and np.ptp(expected) > 0.05


@both
def test_what_a_native_trainer_cannot_train_says_why(backend, checkpoint, tmp_path):
    def train(model: Any) -> None:
        SFTTrainer(model, args=SFTConfig(str(tmp_path), **SETTINGS | {"max_steps": 1}), train_dataset=ROWS).train()

    with pytest.raises(ValueError, match="bias must be one of none, all, lora_only, got 'some'"):
        native_model(checkpoint, backend, bias="some")
    model, _ = native_model(checkpoint, backend, target_modules=TARGETS, bias="lora_only", layers_to_transform=[0])
    expected = logits(moved(model, ".bias", 0.2))
    if backend == "jax":
        with pytest.raises(ValueError, match=r"trained in 1 of 4 stacked blocks; train all or none of them"):
            train(model)
    else:
        train(model)
        assert not torch.equal(logits(model), expected)
    prompt = batch((9,))["input_ids"]
    cached, whole = (model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, whole)
    if backend == "torch":  # a frozen one stays as it was trained, and the others go on
        own = biases(model)
        own[0].requires_grad = False
        before = [bias.detach().clone() for bias in own]
        train(model)
        assert [torch.equal(*pair) for pair in zip(before, own, strict=True)] == [True, False]
    model, _ = native_model(checkpoint, backend, target_modules=TARGETS, bias="lora_only")
    base_of(model).get_submodule("model.layers.1.self_attn.k_proj").bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"must be all of the model's or those of the layers with adapters, and those of 9 of 28"
    ):
        train(model)


def test_biases_of_a_bfloat16_model_are_trained_in_float32(tmp_path):
    folder = Path(write_checkpoint(tmp_path / "model", **BIASED))
    model, _ = FastLanguageModel.from_pretrained(str(folder), backend="torch", dtype="bfloat16", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, bias="all", use_gradient_checkpointing=False)
    model(**batch()).loss.backward()
    assert {(p.dtype, p.grad.dtype) for p in biases(model)} == {(torch.float32, torch.float32)}
