"""The embedding and the head trained whole (PEFT's modules_to_save) in the front end, against transformers, PEFT and TRL."""

from __future__ import annotations

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

from jaxsloth import (
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    UnslothTrainer,
    UnslothTrainingArguments,
    unsloth_train,
)
from jaxsloth.frontend import arguments
from jaxsloth.frontend.adapters import base_of
from jaxsloth.frontend.module.passes import ModulePass, to_torch
from tests.support.modules import (
    BACKENDS,
    TRAINING,
    adapted,
    assert_same_passes,
    batch,
    logits,
    lora,
    losses_of_a_loop,
    moved,
    our_base,
    pair,
    their_base,
    trained,
)
from tests.support.native import logged, native_model, under_their_peft
from tests.support.tiny import CONFIG, WORDS, byte_tokenizer, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
BOTH_ENDS = ["embed_tokens", "lm_head"]
BAR = 1e-5
SETTINGS: dict[str, Any] = {
    **TRAINING,
    "max_steps": 12,
    "learning_rate": 5e-3,
    "max_length": 64,
}
JUDGES: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
ROWS = [{"input_ids": np.random.default_rng(n).integers(2, CONFIG["vocab_size"], 8 + 3 * (n % 9)).tolist()} for n in range(30)]
PAIRS = [
    {"prompt": f"say {n} ", "chosen": " ".join(WORDS[: 2 + n % 4]), "rejected": " ".join(WORDS[5 : 7 + n % 3])}
    for n in range(30)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("whole") / "model"))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], bar: float) -> None:
    assert left.keys() == right.keys() and sum("modules_to_save" in name for name in left) == 2
    for name, value in right.items():
        assert value.norm() > 0
        assert (left[name] - value).norm() < bar * value.norm(), name


def assert_saved_in_16_bits(folder: Path, model: Any) -> None:
    saved = AutoModelForCausalLM.from_pretrained(folder)
    for (name, weight), (_, expected) in zip(saved.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(weight, expected.bfloat16()), name


@both
def test_passes_of_the_module_are_pefts(backend):
    ours, theirs = (moved(model, ".modules_to_save.", 0.02) for model in pair(backend, modules_to_save=BOTH_ENDS))
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    rows = batch()
    real = rows["attention_mask"].bool()

    def hidden(model: Any) -> torch.Tensor:
        return model.get_base_model().model(rows["input_ids"], rows["attention_mask"]).last_hidden_state

    scores = (
        lambda model: model(**rows).loss,
        lambda model: model(**rows).logits[real].logsumexp(-1).sum(),
        lambda model: hidden(model)[real].square().sum(),
    )
    gradients = assert_same_passes(ours, theirs, scores)
    assert len(gradients) == len(trained(theirs))
    on = logits(ours)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-5)
        assert (logits(ours) - on).abs().max() > 1e-2


@both
def test_a_loop_of_ones_own(backend):
    """Optimizers write the weights in place, where a backend has read them, right after a pass."""

    def run(model: Any) -> list[float]:
        return losses_of_a_loop(model, torch.optim.NAdam([p for p in model.parameters() if p.requires_grad], lr=5e-3), 8)

    ours, theirs = pair(backend, modules_to_save=BOTH_ENDS)
    expected = run(theirs)
    assert run(ours) == pytest.approx(expected, abs=BAR) and expected[-1] < expected[0] - 0.5
    stale = ours(**batch())
    with torch.no_grad():
        ours.get_output_embeddings().weight.add_(1.0)
    with pytest.raises(RuntimeError, match="adapters were written"):
        _ = stale.logits


def test_torch_holds_nothing_beside_what_is_trained():
    model = adapted(our_base("jax"), modules_to_save=BOTH_ENDS)
    loss = model(**batch()).loss
    loss.backward()
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    engine = base_of(model).engine
    held.pop(engine.functional.base_weight("lm_head").unsafe_buffer_pointer())  # JAX's own memory
    placeholders = [p for p in model.parameters() if p.numel() > 1 and not any(p.stride())]
    assert sum(held.values()) == 4 * (len(placeholders) + sum(p.numel() for p in model.parameters() if p.requires_grad))
    # The pass reads the weights where they lie.
    prepared = base_of(model).prepare(batch()["input_ids"], None, None)
    weight = model.get_output_embeddings().weight
    assert weight.data_ptr() in [w.data_ptr() for w in prepared.active.full_weights.values()]


@both
def test_what_is_trained_whole_may_be_written_when_a_pass_has_returned(backend):
    """A result that is still being computed must not see it."""
    model = adapted(our_base(backend), modules_to_save=BOTH_ENDS)
    rows, weight = batch((250,) * 6), model.get_output_embeddings().weight
    prepared = base_of(model).prepare(rows["input_ids"], rows["attention_mask"], None)
    groups = prepared.functional.groups(list(prepared.active.adapters))
    asked = ModulePass(
        prepared.functional,
        "logits",
        groups,
        prepared.active.adapters,
        prepared.active.full_weights,
        prepared.tokens,
        prepared.options,
    )
    with torch.no_grad():
        expected, kept = asked().clone(), weight.clone()
        for _ in range(5):
            result = prepared.functional.run("logits", asked.weights(), prepared.tokens, prepared.options)
            weight.zero_()
            torch.testing.assert_close(to_torch(result), expected)
            weight.copy_(kept)


@both
def test_native_training_is_trls_and_peft_reads_what_is_saved(backend, checkpoint, tmp_path):
    """From Unsloth's way of asking to a folder: losses, weights, files, answers, and what a merged model is. The embedding and
    the head have a learning rate of their own, as in its continued pretraining."""
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, backend=backend, load_in_4bit=False, max_seq_length=64)
    before = logits(model)
    with pytest.warns(UserWarning, match=r"trained whole \(modules_to_save\).*lm_head"):
        model = FastLanguageModel.get_peft_model(
            model, r=4, target_modules=["q_proj", "down_proj", "lm_head"], modules_to_save=["embed_tokens"], random_state=1
        )
    theirs = under_their_peft(model, their_base())
    assert sorted(theirs.peft_config["default"].modules_to_save) == BOTH_ENDS
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if p.requires_grad and ("lora_" in n) == adapter], "lr": rate}
        for adapter, rate in ((True, SETTINGS["learning_rate"]), (False, 1e-3))
    ]
    judge = trl.SFTTrainer(
        theirs,
        args=trl.SFTConfig(str(tmp_path / "judge"), **SETTINGS | JUDGES),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.1), None),
    )
    judge.train()
    own = {"embedding_learning_rate": 1e-3, "weight_decay": 0.1}
    args = UnslothTrainingArguments(str(tmp_path / "ours"), **SETTINGS | own)
    trainer = UnslothTrainer(model, args=args, train_dataset=ROWS)
    unsloth_train(trainer)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert len(rates) == 3 and rates[2] == pytest.approx(rates[0] / 5)
    losses = logged(judge.state.log_history, "loss")
    assert np.abs(logged(trainer.state.log_history, "loss") - losses).max() < BAR and np.ptp(losses) > 0.3
    assert_close(trained(model), trained(theirs), 1e-4)

    model.save_pretrained(tmp_path / "peft")
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained_merged(tmp_path / "lora", save_method="lora")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "peft", "lora")]
    for file in files[1:]:
        assert {n: v.shape for n, v in file.items()} == {n: v.shape for n, v in files[0].items()}
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    for name in ("peft", "lora"):
        plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / name))
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-4)
        again, _ = FastLanguageModel.from_pretrained(str(tmp_path / name), backend=backend, load_in_4bit=False)
        assert torch.equal(logits(again), expected) and len(trained(again)) == len(trained(model))
        frozen = peft.PeftModel.from_pretrained(our_base(backend), str(tmp_path / name))
        torch.testing.assert_close(logits(frozen), expected, rtol=0, atol=1e-5)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert_saved_in_16_bits(tmp_path / "merged", plain.merge_and_unload())

    prompt, settings = {"input_ids": batch((12, 12))["input_ids"]}, {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    theirs.eval()
    FastLanguageModel.for_inference(model)
    assert torch.equal(model.generate(**prompt, **settings), theirs.generate(**prompt, **settings))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)
        assert torch.equal(model.generate(**prompt, **settings), their_base().generate(**prompt, **settings))
        model.save_pretrained_merged(tmp_path / "base", tokenizer)
    assert_saved_in_16_bits(tmp_path / "base", their_base())
    torch.testing.assert_close(logits(model), expected)


@both
@pytest.mark.parametrize("trainer", ["sft", "dpo", "transformers"])
def test_trainers_of_others(backend, trainer, tmp_path):
    """TRL's read the head's weight themselves, and ask the module for hidden states alone; the reference of its DPO is a second
    copy of all that is trained."""

    def run(model: Any) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        data = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in ROWS])
        if trainer == "sft":
            args = trl.SFTConfig(str(tmp_path), **SETTINGS | JUDGES)
            made: Any = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=byte_tokenizer())
        elif trainer == "dpo":
            args = trl.DPOConfig(str(tmp_path), **SETTINGS | JUDGES | {"learning_rate": 2e-3, "max_steps": 6})
            pairs = Dataset.from_list(PAIRS)
            made = trl.DPOTrainer(
                moved(model, ".modules_to_save.", 0.02), args=args, train_dataset=pairs, processing_class=byte_tokenizer()
            )
        else:
            own = {name: value for name, value in SETTINGS.items() if name != "max_length"}
            args = transformers.TrainingArguments(str(tmp_path), **own | JUDGES)
            collator = transformers.DataCollatorForSeq2Seq(byte_tokenizer())
            made = transformers.Trainer(model, args=args, train_dataset=data, data_collator=collator)
        made.train()
        return logged(made.state.log_history, "loss"), trained(model)

    (losses, weights), (expected, judged) = (run(model) for model in pair(backend, modules_to_save=BOTH_ENDS))
    assert np.abs(losses - expected).max() < 1e-4 and np.ptp(expected) > 0.3  # logged losses are rounded
    assert_close(weights, judged, 1e-4)


@both
def test_the_reference_of_dpo_is_the_model_as_it_was(backend, checkpoint, tmp_path):
    model, tokenizer = native_model(checkpoint, backend, modules_to_save=BOTH_ENDS)
    moved(model, ".modules_to_save.", 0.02)
    settings = SETTINGS | {"learning_rate": 2e-3, "max_steps": 8}
    judge = trl.DPOTrainer(
        under_their_peft(model, their_base()),
        args=trl.DPOConfig(str(tmp_path / "judge"), **settings | JUDGES),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    judge.train()
    trainer = DPOTrainer(model, args=DPOConfig(str(tmp_path / "ours"), **settings), train_dataset=PAIRS)
    trainer.train()
    for name in ("loss", "rewards/margins"):
        expected = logged(judge.state.log_history, name)
        assert logged(trainer.state.log_history, name) == pytest.approx(expected, abs=2e-5) and np.ptp(expected) > 0.1


@both
def test_an_adapter_without_whole_modules_has_the_bases(backend, checkpoint, tmp_path):
    model, _ = native_model(checkpoint, backend, modules_to_save=["lm_head"])
    config = SFTConfig(str(tmp_path), **SETTINGS | {"max_steps": 2})
    SFTTrainer(model, args=config, train_dataset=ROWS).train()
    model.add_adapter("second", lora(target_modules=["k_proj"]))
    model.set_adapter("second")
    other, _ = native_model(checkpoint, backend, target_modules=["k_proj"])
    with torch.no_grad():
        for (_, p), (_, own) in zip(trained(other).items(), trained(model).items(), strict=True):
            assert p.shape == own.shape
        state = {n.replace("second", "default"): p for n, p in model.named_parameters() if "second" in n}
        for name, p in other.named_parameters():
            if p.requires_grad:
                p.copy_(state[name])
    histories = []
    for own in (model, other):
        trainer = SFTTrainer(own, args=config, train_dataset=ROWS)
        trainer.train()
        histories.append(logged(trainer.state.log_history, "loss"))
    assert histories[0] == pytest.approx(histories[1], abs=1e-6)


@both
def test_what_cannot_be_trained_whole_says_why(backend, tmp_path):
    tied, _ = FastLanguageModel.from_pretrained(
        str(write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)), backend=backend, load_in_4bit=False
    )
    for settings in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}):
        with pytest.raises(ValueError, match=r"is tied .* target linear layers instead"):
            FastLanguageModel.get_peft_model(tied, **settings)
    for targets in ([], ["lm_head", "embed_tokens"]):
        with pytest.raises(ValueError, match=r"target_modules must name linear layers, .*, got \[.*\]"):
            FastLanguageModel.get_peft_model(tied, target_modules=targets)
    with pytest.raises(ValueError, match=r"'lm_head' is tied .* target linear layers instead"):
        adapted(tied, modules_to_save=["lm_head"])
    hooked = adapted(our_base(backend), modules_to_save=["embed_tokens"])
    hooked.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(ValueError, match=r"model.embed_tokens has a hook .* which would never be called"):
        hooked(**batch())
