"""The base's weights as torch sees them: read true wherever they are read, never written; and PEFT's calls that touch them."""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from jaxsloth.backend import BuildOptions
from jaxsloth.frontend.module.placeholders import Placeholder, PlaceholderWriteError, tell_of_casts
from jaxsloth.frontend.peft_models import wrap
from tests.support.modules import BACKENDS, adapted, batch, logits, our_base, pair, their_base

both = pytest.mark.parametrize("backend", BACKENDS)
NAME = "model.layers.1.mlp.up_proj.weight"


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is torch.Tensor and torch.equal(found[name], value), name


@both
def test_a_saved_state_has_the_true_values(backend, tmp_path):
    ours, theirs = pair(backend)
    expected = {name: value.detach().clone() for name, value in theirs.state_dict().items()}
    assert_same(saved(ours.state_dict()), expected)
    assert_same(saved(copy.deepcopy(ours).state_dict()), expected)
    assert_same(saved(dict(Accelerator(cpu=True).get_state_dict(ours))), expected)
    parameters = saved(dict(ours.named_parameters()))
    assert all(torch.equal(value, expected[name]) for name, value in parameters.items())
    ours.load_state_dict(ours.state_dict())  # its own may come back
    ours.load_state_dict(saved(ours.state_dict()))
    for other in (adapted(our_base(backend, seed=1)).state_dict(), saved(adapted(our_base(backend, seed=1)).state_dict())):
        with pytest.raises(RuntimeError, match=r"up_proj.*can't be written"):
            ours.load_state_dict(other)


@both
def test_embeddings_that_peft_saves_are_the_bases(backend, tmp_path):
    ours, theirs = pair(backend)
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / folder, save_embedding_layers=True)
    found, expected = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert "base_model.model.model.embed_tokens.weight" in expected
    assert_same(found, expected)


def test_reading_computes_with_the_values():
    weight: Any = our_base("jax").get_submodule(NAME.removesuffix(".weight")).weight
    expected = their_base().get_parameter(NAME).detach()
    assert isinstance(weight.detach().bfloat16(), Placeholder) and weight.untyped_storage().nbytes() == 4
    assert torch.equal(weight.detach().to(torch.bfloat16) + 0, expected.bfloat16())
    assert torch.equal(weight.numpy().sum() + torch.zeros(()), torch.tensor(expected.numpy().sum()))
    for read in (
        torch.linalg.norm,
        lambda w: w.T[3],
        lambda w: torch.cat([w, w]),
        lambda w: w[2:4],
        lambda w: w.clone().add_(1),
    ):
        assert torch.equal(read(weight), read(expected))
    for write in (
        lambda w: w.add_(1),
        lambda w: w.data.mul_(2),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: torch.nn.init.zeros_(w),
        lambda w: torch.mul(expected, 2, out=w),
        lambda w: setattr(w, "data", torch.zeros_like(expected)),
    ):
        with pytest.raises(PlaceholderWriteError, match=rf"{NAME} can't be written.*save_pretrained_merged"):
            write(weight)


@both
@pytest.mark.parametrize("saved_whole", [None, ["embed_tokens", "lm_head"]])
def test_merges_are_refused_in_words_and_leave_the_model_as_it_was(backend, saved_whole):
    base = our_base(backend)
    names = [] if saved_whole is None else ["model.embed_tokens", "lm_head"]
    model = wrap(
        base, ["model.layers.0.self_attn.q_proj"], names, "kaiming", 0, r=2, lora_alpha=4, lora_dropout=0.0, bias="none"
    )
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight").normal_()
    before = logits(model)
    state = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    for call in (
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
    ):
        with pytest.raises((PlaceholderWriteError, ValueError), match="save_pretrained_merged"):
            call()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert_same({name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}, state)


@both
def test_adapters_are_combined_deleted_and_unloaded_as_peft_does(backend):
    ours, theirs = pair(backend)
    plain = logits(their_base())
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        for kind in ("cat", "svd"):
            model.add_weighted_adapter(["default", "second"], [0.7, 0.4], f"by_{kind}", combination_type=kind)
    for name in ("by_cat", "by_svd", "second"):
        for model in (ours, theirs):
            model.set_adapter(name)
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=5e-5)
    for model in (ours, theirs):
        model.delete_adapter("second")
        model.set_adapter("default")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(ours.unload()), plain, rtol=0, atol=2e-5)


@both
def test_unloading_keeps_what_is_trained_whole_as_peft_does(backend):
    ours, theirs = (adapted(base, modules_to_save=["lm_head"]) for base in (our_base(backend), their_base()))
    for model in (ours, theirs):
        with torch.no_grad():
            model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.mul_(1.5)
    torch.testing.assert_close(logits(ours.unload()), logits(theirs.unload()), rtol=0, atol=2e-5)


@both
def test_a_prepared_bfloat16_model_trains(backend):
    base = our_base(backend, options=BuildOptions(dtype="bfloat16"), nested=True)
    before = logits(base)
    tell_of_casts.cache_clear()
    with pytest.warns(UserWarning, match="casting the base's weights"):
        prepared = peft.prepare_model_for_kbit_training(base)
    assert all(
        p.dtype == torch.float32 and not p.requires_grad for n, p in prepared.named_parameters() if n != "lm_head.weight"
    )
    assert torch.equal(logits(prepared), before)
    model = adapted(prepared)
    loss = model(**batch()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
