"""What checkpoints store against what their configs say; transformers, with bitsandbytes, is the judge."""

from __future__ import annotations

import json
import logging

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.run import Options, convert, plan_opened
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.frontend.loading import load
from tests.support.modules import BACKENDS
from tests.support.sources import examples, first_batch, stream
from tests.support.tiny import CONFIG, random_weights, write_checkpoint

SMALL = CONFIG | {"num_hidden_layers": 2}
TIED = SMALL | {"tie_word_embeddings": True}
HEAD, TABLE, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def folder_of(tmp_path, weights, config=SMALL):
    folder = write_checkpoint(tmp_path / "model", **{key: config[key] for key in ("num_hidden_layers", "tie_word_embeddings")})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_same_logits(folder, within=2e-6, **settings):
    batch = first_batch(stream(examples(2, CONFIG["vocab_size"])))
    judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    with torch.no_grad():
        mask = torch.from_numpy((batch.segments != 0).astype(np.int64))
        expected = judge(input_ids=torch.from_numpy(batch.input_ids.astype(np.int64)), attention_mask=mask).logits.numpy()
    real = batch.segments != 0
    for backend in BACKENDS:
        found = load(str(folder), backend=backend, **settings).model.logits(batch)
        assert np.abs(found - expected)[real].max() <= within * np.abs(expected[real]).max(), backend


def head(seed=2):
    return random_weights(SMALL, seed)[HEAD]


def test_a_head_of_its_own_stays_where_the_config_ties_it(tmp_path, caplog):
    folder = folder_of(tmp_path, random_weights(TIED, 1) | {HEAD: head()}, TIED)
    with caplog.at_level(logging.WARNING, "jaxsloth.convert"):
        assert_same_logits(folder)
    assert "a head of its own is stored, which is used" in caplog.text


def test_an_equal_head_is_the_embedding(tmp_path, caplog):
    weights = random_weights(TIED, 1)
    folder = folder_of(tmp_path, weights | {HEAD: weights[TABLE]}, TIED)
    assert open_checkpoint(folder).spec().head.tied and not caplog.records
    assert_same_logits(folder)


def test_a_head_alone_is_the_embedding_too(tmp_path):
    weights = random_weights(TIED, 1)
    weights[HEAD] = weights.pop(TABLE)
    assert_same_logits(folder_of(tmp_path, weights, TIED))


def test_names_without_the_models_prefix(tmp_path):
    weights = {name.removeprefix("model."): value for name, value in random_weights(SMALL, 1).items()}
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)  # computed, so it may be there
    assert_same_logits(folder_of(tmp_path, weights))


@pytest.mark.parametrize(
    ("extra", "config", "message"),
    [
        (["model.layers.2.self_attn.q_proj.weight"], SMALL, r"no place for 1 .*: model\.layers\.2\.self_attn\.q_proj\.weight;"),
        (["model.layers.1.mlp.up_proj.bias"], SMALL, r"no place for 1 .*: model\.layers\.1\.mlp\.up_proj\.bias;"),
        (["score.weight", "model.layers.0.self_attn.q_norm.weight"], TIED, r"q_norm\.weight, score\.weight;"),
        ([f"extra.{n:02}" for n in range(30)], SMALL, r"for 30 .*: extra\.00, .*extra\.19, … \(30 in all\);"),
    ],
)
def test_tensors_left_over_are_named(tmp_path, extra, config, message):
    folder = folder_of(tmp_path, random_weights(config, 1) | {name: np.ones(4, np.float32) for name in extra}, config)
    with pytest.raises(CheckpointError, match=message):
        load(str(folder), backend="torch")


def test_fewer_layers_than_are_stored(tmp_path):
    folder = folder_of(tmp_path, random_weights(SMALL | {"num_hidden_layers": 3}, 1))
    with pytest.raises(CheckpointError, match=r"no place for 9 of the checkpoint's tensors.*model\.layers\.2\."):
        load(str(folder), backend="torch")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.bool_])
def test_integers_are_no_weights(tmp_path, dtype):
    folder = folder_of(tmp_path, random_weights(SMALL, 1) | {NORM: np.ones(64, dtype)})
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight must be stored as floating-point numbers"):
        load(str(folder), backend="torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_overflow_are_counted(tmp_path, backend):
    weights = random_weights(SMALL, 1)
    weights[NORM][:2] = 1e6
    folder = folder_of(tmp_path, weights)
    assert load(str(folder), backend=backend, dtype="bfloat16").model.base_tensor(NORM)[0] == 999424
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds 2 values too large for float16 \(the first is 1e\+06\)"):
        load(str(folder), backend=backend, dtype="float16")
    opened = open_checkpoint(folder)
    with pytest.raises(ValueError, match="2 values too large for float16"):
        convert(plan_opened(opened, opened.spec(), {}, tmp_path / "merged", "hf", Options(dtype="float16")))
    weights[NORM] = np.full(64, 1e300)
    with pytest.raises(ValueError, match=r"64 values too large for (b?float(16|32)) \(the first is 1e\+300\)"):
        load(str(folder_of(tmp_path / "double", weights)), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_no_numbers_are_refused(tmp_path, backend):
    weights = random_weights(SMALL, 1)
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load(str(folder_of(tmp_path, weights)), backend=backend)


def four_bits(folder, target, skip, nested=True):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu", dtype=torch.float32)
    model.save_pretrained(target)
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (target / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    return target


@pytest.mark.parametrize(
    ("skip", "load_in_4bit", "nested"),
    [
        (["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"], True, True),
        (["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"], False, True),
        pytest.param(["lm_head", "model.layers.0"], True, False, marks=pytest.mark.slow),
        (["model.layers.1.self_attn"], True, True),  # the head is in 4 bits too
    ],
)
def test_dynamic_four_bit_folders_are_read_as_they_are(tmp_path, skip, load_in_4bit, nested):
    folder = four_bits(folder_of(tmp_path, random_weights(SMALL, 1)), tmp_path / "4bit", skip, nested)
    assert_same_logits(folder, within=2e-5, load_in_4bit=load_in_4bit)
    stored = open_checkpoint(folder).spec().quantization
    assert stored is not None and not set(stored.modules) & set(skip) and len(stored.modules) >= 7


def test_block_maxima_that_are_no_numbers(tmp_path):
    folder = four_bits(folder_of(tmp_path, random_weights(SMALL, 1)), tmp_path / "4bit", ["lm_head"], nested=False)
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight.absmax"][1] = np.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has NaN or infinite block maxima"):
        load(str(folder), backend="torch")


def test_bfloat16_heads_are_compared_too(tmp_path):
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in random_weights(TIED, 1).items()}
    folder = folder_of(tmp_path, weights | {HEAD: weights[TABLE]}, TIED)
    assert open_checkpoint(folder).spec().head.tied
    folder = folder_of(tmp_path / "other", weights | {HEAD: head().astype(ml_dtypes.bfloat16)}, TIED)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert not open_checkpoint(folder).spec().head.tied
