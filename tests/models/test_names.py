"""Names: base tensors against transformers, trained ones and target matching against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jaxsloth.models.names import tensor_shapes, trainable_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import Attention, Block, Embedding, Head, Mlp, ModelSpec, Norm, Rope
from jaxsloth.transforms import add_lora, match_modules, quantize

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def llama(**changes):
    config = LlamaConfig(**SMALL, **changes)
    return LlamaForCausalLM(config), spec_from_config(config.to_dict())


def shapes_of(model) -> dict:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_base_tensors_are_transformers(changes):
    model, spec = llama(**changes)
    assert tensor_shapes(spec) == shapes_of(model)


@pytest.mark.parametrize(
    "lora",
    [
        {"targets": "all-linear"},
        {"targets": ["q_proj", "v_proj"], "rslora": True},
        {"targets": ["down_proj"], "modules_to_save": ["lm_head"]},
        {"targets": ["o_proj"], "bias": "all"},
        {"targets": ["o_proj"], "bias": "lora_only"},
    ],
)
def test_trained_tensors_are_pefts(lora):
    biased = "bias" in lora
    model, spec = llama(attention_bias=biased, mlp_bias=biased)
    arguments: dict[str, Any] = dict(lora)
    arguments["target_modules"] = arguments.pop("targets")
    arguments["use_rslora"] = arguments.pop("rslora", False)
    judge = get_peft_model_state_dict(get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **arguments)))
    ours = trainable_shapes(add_lora(spec, r=4, alpha=8.0, **lora))
    assert ours == {name: tuple(value.shape) for name, value in judge.items()}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"], r".*layers\.1\.mlp\.(gate|down)_proj"])
def test_targets_match_as_pefts(targets):
    model, spec = llama()
    judge = get_peft_model(model, LoraConfig(target_modules=targets)).targeted_module_names
    assert set(match_modules(spec, targets)) == set(judge)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q_proj", "query"]}, "'query' matches no linear layer; the layers end in"),
        ({"targets": "nothing.*"}, "the expression 'nothing.*' matches no linear layer"),
        ({"modules_to_save": ["norm"]}, "'norm' can't be trained whole"),
    ],
)
def test_wrong_targets(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_lora(llama()[1], r=4, alpha=8.0, **arguments)


def test_a_tied_head_is_not_trained_apart():
    with pytest.raises(ValueError, match="tied"):
        add_lora(llama(tie_word_embeddings=True)[1], r=4, alpha=8.0, modules_to_save=["lm_head"])


def test_quantize_names_every_linear_layer_of_the_blocks():
    spec = quantize(llama()[1], nested=True)
    assert spec.quantization is not None
    assert len(spec.quantization.modules) == 14 and "lm_head" not in spec.quantization.modules


def block(make=Block.pre_norm, norm=None, **parts) -> Block:
    norm = norm or Norm()
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 8**-0.5, "rope": Rope(1e4, 8)} | parts.get("attention", {})
    mlp = {"width": 48, "activation": "silu"} | parts.get("mlp", {})
    return make(Attention(**attention), Mlp(**mlp), norm)


def spec_of(layers, **changes) -> ModelSpec:
    values = {"embedding": Embedding(vocab=50), "norm": Norm(), "head": Head(), "max_positions": 64} | changes
    return ModelSpec(family="test", hidden=32, layers=tuple(layers), **values)


def test_the_spec_expresses_other_families():
    """Their tensors' names and shapes; that they run is the issue «families»."""
    gemma = Norm(weight_offset=1.0)
    cases = {
        "mistral": (MistralForCausalLM(MistralConfig(**SMALL)), spec_of([block(attention={"window": 4096})] * 2)),
        "qwen3": (
            Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)),
            spec_of([block(attention={"qk_norm": Norm()})] * 2, head=Head(tied=True)),
        ),
        "gemma2": (
            Gemma2ForCausalLM(Gemma2Config(**SMALL)),
            spec_of(
                [
                    block(Block.sandwich, gemma, attention={"window": w, "soft_cap": 50.0}, mlp={"activation": "gelu_tanh"})
                    for w in (8, None)
                ],
                embedding=Embedding(vocab=50, scale=32**0.5),
                norm=gemma,
                head=Head(tied=True, soft_cap=30.0),
            ),
        ),
        "qwen2": (
            Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
            spec_of([block(attention={"qkv_bias": True})] * 2),
        ),
        "gemma": (
            GemmaForCausalLM(GemmaConfig(**SMALL)),
            spec_of([block(norm=gemma)] * 2, norm=gemma, embedding=Embedding(50, scale=32**0.5), head=Head(tied=True)),
        ),
        "gemma3": (
            Gemma3ForCausalLM(Gemma3TextConfig(**SMALL)),
            spec_of([block(Block.sandwich, gemma, attention={"qk_norm": gemma})] * 2, norm=gemma, head=Head(tied=True)),
        ),
        "phi3": (
            Phi3ForCausalLM(Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
            spec_of([block(attention={"fused_qkv": True}, mlp={"fused": True})] * 2),
        ),
    }
    for family, (model, spec) in cases.items():
        assert tensor_shapes(spec) == shapes_of(model), family
    assert cases["gemma2"][1].layer_period() == 2
    assert cases["mistral"][1].layer_period() == 1
