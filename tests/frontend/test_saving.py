"""What is saved, as transformers, PEFT and bitsandbytes read it."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxsloth import FastLanguageModel
from jaxsloth.convert.files import ExistsError, parse_size
from jaxsloth.frontend.saving import HubError
from tests.support.modules import BACKENDS, adapted, batch
from tests.support.tiny import with_merge, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(with_merge(write_checkpoint(tmp_path_factory.mktemp("saving") / "model")))


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


def with_a_merge(folder):
    """transformers reads no GGUF tokenizer without any merge."""
    write_checkpoint(folder)
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["model"] |= {"vocab": document["model"]["vocab"] | {"he": 258}, "merges": [["h", "e"]]}
    file.write_text(json.dumps(document), encoding="utf-8")
    return str(folder)


@both
def test_gguf_holds_the_merged_model(tmp_path, backend):
    """Read by transformers: PEFT's merged weights in the blocks' precision, the tokenizer, and a template that was changed."""
    base, tokenizer = load(with_a_merge(tmp_path / "base"), backend)
    model = FastLanguageModel.get_peft_model(base, r=4, target_modules=["q_proj", "k_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    files = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method=["f16", "fast_quantized", "q8_0"])
    assert [file.name for file in files] == ["base.F16.gguf", "base.Q8_0.gguf"]
    model.save_pretrained(tmp_path / "again", save_format="gguf", quantization_method="f16")
    judge = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(_adapter(model, tmp_path))
    ).merge_and_unload()  # type: ignore[operator]
    weights = judge.state_dict()
    for file, bar in ((files[0], 2**-11), (files[1], 2**-7)):
        theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        for name, value in theirs.state_dict().items():
            assert (value - weights[name]).abs().max() <= bar * weights[name].abs().max(), name
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=files[0].name)
    assert read.chat_template == tokenizer.chat_template and read("hehe 12").input_ids == tokenizer("hehe 12").input_ids
    assert (tmp_path / "again" / "base.F16.gguf").stat().st_size > 0
    with pytest.raises(ExistsError, match=r"base\.F16\.gguf exists already"):
        model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method=["q4_0", "f16"])
    assert len(list((tmp_path / "out").iterdir())) == 2  # nothing of the list was written
    for wrong in ("q9", []):
        with pytest.raises(ValueError, match="quantization_method must"):
            model.save_pretrained_gguf(tmp_path / "x", tokenizer, quantization_method=wrong)
    with pytest.raises(ValueError, match="save_format must be one of gguf, merged_16bit"):
        model.save_pretrained(tmp_path / "x", save_format="ggml")
    assert not (tmp_path / "x").exists()


def test_layers_without_an_adapter_keep_their_bits(checkpoint, tmp_path):
    """Of a base that is NF4 only what the adapter changes is quantized again."""
    adapted(load(checkpoint, "torch")[0]).save_pretrained_merged(tmp_path / "four", save_method="merged_4bit")
    again = FastLanguageModel.get_peft_model(
        load(str(tmp_path / "four"), "torch", load_in_4bit=True)[0], target_modules=["q_proj"]
    )
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    again.save_pretrained_merged(tmp_path / "eight", save_method="merged_4bit_forced")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("four", "eight"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith(("weight", "absmax")) and "proj" in name:
            assert np.array_equal(value, after[name]) == ("q_proj" not in name), name


class Hub:
    """What is asked of huggingface_hub's HfApi, kept."""

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, repo_id, folder_path, commit_message, revision):
        files = sorted(str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file())
        return self.token, repo_id, files, commit_message, revision


def test_what_reaches_the_hub(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = adapted(load(checkpoint, "torch")[0])
    settings = {"token": "hf_x", "commit_message": "Mine", "revision": "two"}
    found = model.push_to_hub_gguf("tiny", quantization_method=["q8_0", "f16"], **settings)
    assert found == ("hf_x", "me/tiny", ["model.F16.gguf", "model.Q8_0.gguf"], "Mine", "two")
    _, _, files, message, _ = model.push_to_hub_merged("tiny", save_method="merged_4bit")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files) and message
