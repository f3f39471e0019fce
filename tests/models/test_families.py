"""Every family on both backends, by one body, judged by transformers and PEFT on small random models."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxsloth.backend import BuildOptions, OptimizerOptions
from jaxsloth.generation import GenerationSettings, generate
from jaxsloth.models.config import ConfigError
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.registry import families, spec_from_config
from jaxsloth.parity.l2_logits import pack
from jaxsloth.parity.measure import max_abs, relative_frobenius
from jaxsloth.parity.subjects import judge_logits, valid_rows
from tests.support.families import ARCHITECTURES, FAMILIES, TWO_ROPES, changes_of, config_of
from tests.support.small_models import VOCAB, build, judge_loss, losses_of, peft_model
from tests.support.sources import examples, first_batch, stream, transformers_model
from tests.support.tiny import CONFIG, byte_tokenizer, random_weights

every_family = pytest.mark.parametrize("family", FAMILIES)
# JAX compiles a program for each kind of block: all but three families are judged on it by the slow tests.
QUICK = ("qwen3", "gemma2", "phi3")
both = pytest.mark.parametrize(
    ("backend", "family"),
    [
        pytest.param(backend, family, marks=[pytest.mark.slow] if backend == "jax" and family not in QUICK else [])
        for backend in ("torch", "jax")
        for family in FAMILIES
    ],
)


def test_every_family_is_here():
    assert families().keys() == FAMILIES.keys()


@both
def test_logits_and_gradients_are_those_of_transformers_and_peft(backend, family):
    """Padded and packed, in rows longer than the windows."""
    model, spec, weights, values = build(backend, changes_of(family), lora={"targets": "all-linear"})
    batch = first_batch(stream(examples(4, VOCAB)))
    judge = peft_model(config_of(family), weights, spec, values)
    expected = judge_logits(judge, batch)
    assert max_abs(valid_rows(model.logits(batch), batch), valid_rows(expected, batch)) <= 1e-4 * np.abs(expected).max()
    judged = judge_loss(judge, batch)
    judged.backward()
    found = {n.replace(".default.", "."): p.grad.numpy() for n, p in judge.named_parameters() if p.grad is not None}
    for rows in (batch, pack(batch)):
        loss, gradients = model.gradients(rows)
        assert abs(loss - judged.item()) <= 1e-5
        assert found.keys() == gradients.keys()
        # The attention of some of those heads hardly moves: 1e-5 of the largest gradient is rounding.
        floor = 1e-5 * max(np.abs(g).max() for g in found.values())
        for name, gradient in gradients.items():
            assert relative_frobenius(gradient, found[name]) <= 1e-4 or max_abs(gradient, found[name]) <= floor, name


@both
def test_greedy_tokens_are_transformers(backend, family):
    model, _, weights, _ = build(backend, changes_of(family), stir=False)
    judge = transformers_model(config_of(family), weights)
    prompt = [5, 9, 77, 30, 200, 3, 4, 8, 15, 16]
    answer = judge.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=[], pad_token_id=0)
    settings = GenerationSettings(max_new_tokens=16, eos_ids=())
    assert generate(model, [prompt], settings)[0] == answer[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "phi3"])
def test_quantized_training_is_the_same_on_both_backends(family):
    """Of a model of two layers, one of each kind."""
    windows = stream(examples(24, VOCAB), batch_size=2)
    changes = changes_of(family) | {"num_hidden_layers": 2, "max_window_layers": 1}
    options = BuildOptions(implementations={"train_pass": "written"})
    losses = []
    for backend in ("torch", "jax"):
        model, *_ = build(backend, changes, nested=True, options=options)
        losses.append(losses_of(model, windows, 10, OptimizerOptions(), rate=1e-3)[0])
    # Of a loss near 7. AdamW's first steps make much of gradients that are all but 0: up to 2e-4 in gemma3_text.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3, atol=0)
    assert np.abs(losses[0] - losses[0][0]).max() > 0.1


# A field of a family's config -> another value than its default. Names that say nothing of the forward pass are left out.
OTHER = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 300,
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.1,
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 5,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 99,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
    "use_bidirectional_attention": True,
    "no_rope_layers": [0, 0, 1, 1],
    "no_rope_layer_interval": 3,
    "original_max_position_embeddings": 4,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}
# Of training, of loading, of tokens, or of how weights are made: the logits do not depend on them.
OF_NO_EFFECT = {
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "use_cache", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "torch_dtype", "id2label", "label2id"),
    *("return_dict", "output_hidden_states", "output_attentions", "problem_type", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "transformers_version", "model_type", "_name_or_path", "name_or_path", "num_labels"),
    *("default_theta", "rope_scaling", "cache_implementation", "_sliding_window_pattern", "is_decoder"),
}


@every_family
def test_every_field_of_a_config_is_used_or_refused(family):
    """One field at a time is changed from what the config class has; the logits follow transformers' or the load names it."""
    fields = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    unknown = fields.keys() - OTHER.keys() - OF_NO_EFFECT
    assert not unknown, f"say of {sorted(unknown)} whether the logits depend on them"
    batch = first_batch(stream(examples(2, VOCAB), batch_size=2))
    for name in sorted(fields.keys() & OTHER.keys()):
        value = TWO_ROPES if name == "rope_parameters" and family == "gemma3_text" else OTHER[name]
        config = config_of(family) | {name: copy.deepcopy(value)}
        if name in ("hidden_size", "num_attention_heads", "head_dim"):
            config.pop("rope_parameters", None)  # those of phi3 are a number a channel pair
        try:
            spec_from_config(config)
        except ConfigError as error:
            assert name in str(error) or name == "head_dim", error
            continue
        weights = random_weights(config, 1)
        model, *_ = build("torch", config | dict.fromkeys(CONFIG.keys() - config.keys()), stir=False)
        expected = judge_logits(transformers_model(config, weights), batch)
        worst = max_abs(valid_rows(model.logits(batch), batch), valid_rows(expected, batch))
        assert worst <= 1e-4 * np.abs(expected).max(), f"{name}: {worst}"


@every_family
def test_configs_of_transformers_4_and_5_are_the_same(family):
    """rope_theta and rope_scaling beside each other, or both in rope_parameters; what a class has as default left out."""
    five = json.loads(
        AutoConfig.for_model(family, **{k: v for k, v in config_of(family).items() if k != "model_type"}).to_json_string()
    )
    assert spec_from_config(five) == spec_from_config(config_of(family))
    four = {k: v for k, v in five.items() if k not in ("rope_parameters", "layer_types")}
    given = five["rope_parameters"]
    if family == "gemma3_text":
        four |= {"rope_theta": 1e6, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        four["sliding_window_pattern"] = 2
    else:
        scaling = {k: v for k, v in given.items() if k not in ("rope_theta", "partial_rotary_factor")}
        four |= {"rope_theta": given["rope_theta"], "partial_rotary_factor": given.get("partial_rotary_factor", 1.0)}
        four["rope_scaling"] = None if given["rope_type"] == "default" else scaling
    assert spec_from_config(four) == spec_from_config(config_of(family))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])
def test_parts_of_heads_are_rotated_by_phi3_alone(family):
    """transformers' other classes do not look at the field."""
    with pytest.raises(ConfigError, match="partial_rotary_factor must be 1"):
        spec_from_config(config_of(family) | {"partial_rotary_factor": 0.5})


def test_what_transformers_writes_is_read(tmp_path):
    """A config.json of the class's defaults, as save_pretrained has it."""
    for family in FAMILIES:
        made = AutoConfig.for_model(family)
        made.architectures = [ARCHITECTURES[family]]
        made.save_pretrained(tmp_path / family)
        written = json.loads((tmp_path / family / "config.json").read_text())
        with torch.device("meta"):
            judge = AutoModelForCausalLM.from_config(made)
        spec = spec_from_config(written)
        shapes = {name: tuple(value.shape) for name, value in judge.state_dict().items()}
        if spec.head.tied:
            shapes.pop("lm_head.weight")
        assert tensor_shapes(spec) == shapes, family


@pytest.mark.parametrize(
    ("backend", "family"),
    [("torch", family) for family in FAMILIES] + [pytest.param("jax", "gemma3_text", marks=pytest.mark.slow)],
)
def test_a_folder_of_transformers_trains_and_peft_reads_what_is_saved(tmp_path, backend, family):
    """Through the calls that users make: load in 4 bits, adapters, train, answer, save."""
    from datasets import Dataset
    from peft import PeftModel

    from jaxsloth import FastLanguageModel, SFTConfig, SFTTrainer

    weights = random_weights(config_of(family), 1)
    judge = transformers_model(config_of(family), weights)
    judge.config.architectures = [ARCHITECTURES[family]]
    judge.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tmp_path / "base"), backend=backend, load_in_4bit=False, dtype="float32", max_seq_length=128
    )
    ids = torch.tensor([[5, 9, 77, 30, 200, 3, 4, 8, 15, 16, 23, 42, 99, 7]])
    base = judge(input_ids=ids).logits.detach()
    scale = base.abs().max()
    assert (model(input_ids=ids).logits - base).abs().max() <= 1e-4 * scale
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, target_modules="all-linear")
    rows = Dataset.from_dict({"text": ["the duck lays sixteen eggs a day", "and sells them at every market"] * 4})
    arguments = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, report_to="none")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    FastLanguageModel.for_inference(model)
    answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(str(tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(judge, str(tmp_path / "adapter")).eval()
    assert (model(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max() <= 1e-4 * scale
    assert (theirs(input_ids=ids).logits - base).abs().max() > 1e-2 * scale
    assert answer.tolist() == theirs.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist()
