"""Where adapters start: PEFT's distributions, from the seed and the module's name alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from jaxsloth.models.names import lora_names, trainable_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.transforms import add_lora
from tests.support.tiny import CONFIG

R = 16
CONFIG_192 = CONFIG | {"hidden_size": 192, "head_dim": 48, "num_hidden_layers": 1, "attention_bias": True}


def no_base(name):
    raise AssertionError(f"no base tensor is copied, and {name} was asked for")


@pytest.fixture
def spec():
    return add_lora(spec_from_config(CONFIG), r=R, alpha=16)


@pytest.mark.parametrize(("ours", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_a_is_distributed_as_peft_draws_it_and_b_is_zero(ours, theirs):
    torch.manual_seed(0)
    config = LlamaConfig(**{k: v for k, v in CONFIG_192.items() if k not in ("architectures", "model_type")})
    lora = LoraConfig(r=R, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=theirs)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    judge = {n: p.detach().numpy() for n, p in model.named_parameters() if "lora_" in n}
    spec = add_lora(spec_from_config(CONFIG_192), r=R, alpha=16, targets=["q_proj"])
    values = initial_adapters(spec, ours, 3, no_base)
    a, b = lora_names("model.layers.0.self_attn.q_proj")
    assert values[a].dtype == np.float32
    expected = judge[a.replace(".weight", ".default.weight")]
    assert stats.ks_2samp(values[a].ravel(), expected.ravel()).pvalue > 1e-3
    assert values[a].std() == pytest.approx(expected.std(), rel=0.05)
    assert not values[b].any()
    assert not judge[b.replace(".weight", ".default.weight")].any()


def test_a_module_starts_alike_whatever_else_is_trained(spec):
    everything = initial_adapters(spec, "kaiming", 5, no_base)
    assert list(everything) == list(trainable_shapes(spec))
    fewer = initial_adapters(add_lora(replace(spec, lora=None), r=R, alpha=16, targets=["v_proj"]), "kaiming", 5, no_base)
    assert 0 < len(fewer) < len(everything)
    for name, value in fewer.items():
        np.testing.assert_array_equal(value, everything[name])


def test_seeds_and_modules_differ(spec):
    first, second = initial_adapters(spec, "kaiming", 0, no_base), initial_adapters(spec, "kaiming", 1, no_base)
    a0, _ = lora_names("model.layers.0.self_attn.q_proj")
    a1, _ = lora_names("model.layers.1.self_attn.q_proj")
    assert np.abs(np.corrcoef(first[a0].ravel(), second[a0].ravel())[0, 1]) < 0.15
    assert np.abs(np.corrcoef(first[a0].ravel(), first[a1].ravel())[0, 1]) < 0.15


def test_whole_modules_and_biases_start_as_the_base():
    spec = add_lora(
        spec_from_config(CONFIG_192), r=2, alpha=4, targets=["q_proj"], bias="lora_only", modules_to_save=["lm_head"]
    )
    base = {
        "lm_head.weight": np.full((260, 192), 0.5, np.float32),
        "model.layers.0.self_attn.q_proj.bias": np.arange(192, dtype=np.float32),
    }
    values = initial_adapters(spec, "kaiming", 0, base.__getitem__)
    for name, tensor in base.items():
        called = name.replace("q_proj.bias", "q_proj.base_layer.bias")  # PEFT's name once the layer has an adapter
        np.testing.assert_array_equal(values[f"base_model.model.{called}"], tensor)
