"""What is saved, as transformers, PEFT and bitsandbytes read it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxsloth import FastLanguageModel
from jaxsloth.convert.files import ExistsError, parse_size
from jaxsloth.frontend.saving import HubError
from tests.support.modules import BACKENDS, adapted, batch
from tests.support.tiny import write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("saving") / "model"))


def load(checkpoint, backend, **settings):
    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint, backend=backend, max_seq_length=64, **{"load_in_4bit": False} | settings
    )
    return model, tokenizer


def logits(model):
    with torch.no_grad():
        return model(batch()["input_ids"]).logits.float()


@both
def test_merged_16bit_is_read_by_transformers(checkpoint, tmp_path, backend):
    base, tokenizer = load(checkpoint, backend, dtype=torch.bfloat16)
    model = adapted(base)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, save_method="merged_16bit", max_shard_size="100KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    judge = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), str(_adapter(model, tmp_path))
    ).merge_and_unload()  # type: ignore[operator]
    for (name, parameter), (_, expected) in zip(theirs.named_parameters(), judge.named_parameters(), strict=True):
        assert torch.equal(parameter, expected.bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tokenizer.get_vocab()
    again, _ = load(str(tmp_path / "merged"), backend, dtype=torch.float32)
    assert (logits(again) - logits(judge)).abs().max() < 0.1


def _adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@both
def test_merged_4bit_is_bitsandbytes(checkpoint, tmp_path, backend):
    model = adapted(load(checkpoint, backend)[0])
    model.save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "four", dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    again, _ = load(str(tmp_path / "four"), backend, load_in_4bit=True, dtype=torch.float32)
    assert again.engine.model.spec.quantization.nested
    # The checkpoint's dense weights and compute dtype are bfloat16 there.
    assert (logits(again) - logits(theirs)).abs().max() < 0.1 * logits(again).abs().max()
    again.save_pretrained_merged(tmp_path / "plain", save_method="merged_16bit")  # a 4-bit base is merged as it computes
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@both
def test_adapters_are_saved_and_loaded_and_trained_further(checkpoint, tmp_path, backend):
    base, tokenizer = load(checkpoint, backend)
    model = adapted(base, use_rslora=True, r=3)
    model.save_pretrained(tmp_path / "peft")
    model.save_pretrained_merged(tmp_path / "ours", tokenizer, save_method="lora")
    for name in ("peft", "ours"):
        again, _ = load(str(tmp_path / name), backend)
        assert isinstance(again, peft.PeftModel) and torch.equal(logits(again), logits(model))
        assert any(parameter.requires_grad for parameter in again.parameters())
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / "ours"))
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4


def test_nothing_is_overwritten_unasked(checkpoint, tmp_path):
    model = adapted(load(checkpoint, "torch")[0])
    (tmp_path / "out").mkdir()
    model.save_pretrained_merged(tmp_path / "out")  # an empty folder may be filled
    with pytest.raises(ExistsError, match="overwrite=True"):
        model.save_pretrained_merged(tmp_path / "out")
    model.save_pretrained_merged(tmp_path / "out", save_method="lora", overwrite=True)
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_wrong_arguments(checkpoint, tmp_path):
    model = adapted(load(checkpoint, "torch")[0])
    with pytest.raises(ValueError, match="save_method must be one of merged_16bit"):
        model.save_pretrained_merged(tmp_path / "x", save_method="gguf")
    with pytest.raises(TypeError, match="did you mean 'overwrite'"):
        model.save_pretrained_merged(tmp_path / "x", overwrit=True)
    with pytest.raises(ValueError, match="only safetensors are written"):
        model.save_pretrained_merged(tmp_path / "x", safe_serialization=False)
    with pytest.raises(ValueError, match="must look like '5GB'"):
        parse_size("much")
    assert parse_size("1.5GB") == 1_500_000_000 and parse_size("2GiB") == 2 << 30
    assert not (tmp_path / "x").exists()


def test_the_hub_offline(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = adapted(load(checkpoint, "torch")[0])
    with pytest.raises(HubError, match=r"(?s)someone/model could not be written .*needs a network, and a token"):
        model.push_to_hub_merged("someone/model", save_method="lora", token="hf_x")
