"""``--merge`` of every kind of PEFT adapter that there is here, against PEFT's own merge."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from tests.support.tiny import write_checkpoint

KINDS = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r".*\.1\..*q_proj": 7, "down_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "layers": {"layers_to_transform": [1]},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "dora with patterns": {"use_dora": True, "rank_pattern": {"down_proj": 2}, "use_rslora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "base"
    return write_checkpoint(folder, num_hidden_layers=2, attention_bias=True, mlp_bias=True)


def adapter(base, folder, **kind):
    """(PEFT's model, the folder of its adapter); everything that it trains is moved."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    config = peft.LoraConfig(**settings | kind, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_merges_are_pefts(kind, base, tmp_path):
    model, folder = adapter(base, tmp_path / "adapter", **kind)
    found = load_file(convert(plan(str(base), tmp_path / "out", "hf", Options(merge=folder))) / "model.safetensors")
    plain, judge = load_file(base / "model.safetensors"), model.merge_and_unload().state_dict()  # type: ignore[operator]
    assert found.keys() == judge.keys()
    moved = 0
    for name, value in judge.items():
        assert (found[name] - value).abs().max() <= 1e-6, name
        moved += not torch.equal(value, plain[name])
    assert moved == {"biases": 18, "own biases": 8, "saved": 6, "layers": 2, "patterns": 3}.get(kind_name(kind), 4)


def kind_name(kind):
    return next(name for name, value in KINDS.items() if value is kind)


def test_dora_is_merged_only_and_whole(base, tmp_path):
    """To be trained on it is refused; a magnitude that is missing is named."""
    _, folder = adapter(base, tmp_path / "adapter", use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora must be false, got true: it is not supported"):
        plan(str(folder), tmp_path / "out", "peft")
    values = load_file(folder / "adapter_model.safetensors")
    del values["base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"]
    save_file(values, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.1\.mlp\.down_proj\.lora_magnitude_vector \(1 missing\)"):
        plan(str(base), tmp_path / "out", "hf", Options(merge=folder))
    assert not (tmp_path / "out").exists()
