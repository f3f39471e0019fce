"""Adapters from elsewhere: which layers PEFT's fields cover, with which rank and scaling, and what such an adapter computes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxsloth import FastLanguageModel, foreign
from jaxsloth.batch import Batch
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.peft_adapter import base_model_of, find_adapter, fitted_adapter, read_adapter
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.frontend.loading import load
from jaxsloth.models.names import lora_names
from jaxsloth.models.registry import spec_from_config
from jaxsloth.training.run import make_plan
from tests.support.modules import BACKENDS, batch, logits
from tests.support.sources import transformers_model
from tests.support.tiny import CONFIG, random_weights, tiny_recipe, write_checkpoint, write_rows

BASE = CONFIG | {"hidden_size": 16, "intermediate_size": 16, "head_dim": 4, "vocab_size": 8, "num_hidden_layers": 3}
NAMES = ("q_proj", "v_proj", "mlp.down_proj", "layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head", "proj")
# The fields of PEFT's LoraConfig that say where adapters go and how large they are; each config draws some of them.
FIELDS = {
    "target_modules": [
        list(NAMES[:3]),
        ["q_proj", "lm_head"],
        list(NAMES[3:6]),
        ["proj", "k_proj"],
        "all-linear",
        r".*layers\.[02]\.(self_attn|mlp)\.(q|up)_proj",
        r"model\.layers\.1\..*",
        "q_proj",
    ],
    "exclude_modules": [None, ["q_proj"], ["layers.1.mlp.up_proj", "lm_head"], r".*\.2\..*", "down_proj", []],
    "layers_to_transform": [None, 1, [0, 2], [], [7]],
    "layers_pattern": [None, "layers", ["h", "layers"], "h", []],
    "rank_pattern": [{}, {"q_proj": 2}, {r".*\.1\..*": 3, "down_proj": 4}, {"model.layers.2.self_attn.q_proj": 7}],
    "alpha_pattern": [{}, {"v_proj": 2}, {"layers.1.mlp.up_proj": 3.5}, {"^q_proj": 9}],
    "modules_to_save": [None, ["lm_head"], ["embed_tokens", "lm_head"]],
    "use_rslora": [False, True],
    "fan_in_fan_out": [False, True],
}


def drawn(generator):
    fields = {name: values[int(generator.integers(len(values)))] for name, values in FIELDS.items()}
    if isinstance(fields["target_modules"], str):  # PEFT refuses both
        fields["layers_to_transform"] = fields["layers_pattern"] = None
    if fields["layers_to_transform"] is None:
        fields["layers_pattern"] = None
    return fields


@pytest.fixture(scope="module")
def tiny():
    return transformers_model(BASE, random_weights(BASE, 0))


@pytest.mark.filterwarnings("ignore")
def test_coverage_is_pefts(tiny, tmp_path):
    generator, judged, apart = np.random.default_rng(3), 0, 0
    for number in range(120):
        fields = drawn(generator)
        try:
            theirs = peft.get_peft_model(tiny, peft.LoraConfig(r=5, lora_alpha=10, task_type="CAUSAL_LM", **fields))
        except ValueError:  # nothing is covered
            continue
        layers = {
            name.removeprefix("base_model.model."): layer
            for name, layer in theirs.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }
        theirs.save_pretrained(tmp_path / str(number), save_embedding_layers=False)
        if "lm_head" in layers:
            with pytest.raises(CheckpointError, match=r"has base_model\.model\.lm_head\.lora_A|must match a linear layer"):
                fitted_adapter(tmp_path / str(number), spec_from_config(BASE))
        else:
            config, values = read_adapter(tmp_path / str(number))
            spec, found = config.fitted(spec_from_config(BASE), values, "it")
            assert set(spec.lora.modules) == set(layers), fields
            for name, layer in layers.items():
                assert (config.rank(name), config.scale(name)) == (layer.r["default"], layer.scaling["default"]), fields
                a, b = (found[part].astype(np.float64) for part in lora_names(name))
                delta = layer.get_delta_weight("default").detach().numpy()
                assert np.abs(spec.lora.scale * b @ a - delta).max() <= 1e-6
            apart += len({layer.r["default"] for layer in layers.values()}) > 1
            judged += 1
        theirs.unload()
        tiny.lm_head.requires_grad_(False)
    assert judged > 40 and apart > 10


PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "mlp.down_proj"],
    "exclude_modules": ["layers.0.self_attn.v_proj"],
    "layers_to_transform": [0, 1],
    "rank_pattern": {r".*\.1\..*q_proj": 7, "down_proj": 2},
    "alpha_pattern": {"v_proj": 3},
    "modules_to_save": ["lm_head"],
    "use_rslora": True,
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(the base's folder, PEFT's model over it, its adapter's folder)."""
    folder = tmp_path_factory.mktemp("patterns")
    base = write_checkpoint(folder / "base", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings, **PATTERNS)).eval()
    with torch.no_grad():
        wrapped.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").mul_(1.5)
    wrapped.save_pretrained(folder / "adapter")
    return base, wrapped, folder / "adapter"


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_doors_compute_pefts_patterns(theirs, tmp_path, backend):
    base, judge, adapter = theirs
    expected = logits(judge)
    model, _ = FastLanguageModel.from_pretrained(str(adapter), backend=backend, load_in_4bit=False)
    assert torch.allclose(logits(model), expected, rtol=0, atol=2e-5)
    native = load(str(base), backend=backend).model
    native.add_adapters(*fitted_adapter(adapter, native.spec))  # the command line's
    ids = batch()["input_ids"].numpy().astype(np.int32)
    ones = np.ones(ids.shape, np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    found = native.logits(Batch(ids, ids, ones, positions, np.arange(len(ids), dtype=np.int32)))
    assert np.abs(found - expected.numpy()).max() <= 2e-5
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_16bit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for module in ("layers.0.mlp.down_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"):
        layer = judge.base_model.model.model.get_submodule(module)
        delta = layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else 0.0
        weight = layer.get_base_layer().weight if hasattr(layer, "get_base_layer") else layer.weight
        torch.testing.assert_close(merged.get_submodule(f"model.{module}").weight, weight + delta, rtol=2**-8, atol=1e-6)


def damaged(source, target, config=None, **tensors):
    target.mkdir()
    fields = json.loads((source / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(fields))
    save_file({**load_file(source / "adapter_model.safetensors"), **tensors}, target / "adapter_model.safetensors")
    return target


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapters_values_are_finite_at_both_doors(theirs, tmp_path, value):
    a = load_file(theirs[2] / "adapter_model.safetensors")[Q]
    a[1, 1] = value
    folder = damaged(theirs[2], tmp_path / "adapter", **{Q: a})
    for door in (
        lambda: fitted_adapter(folder, open_checkpoint(theirs[0]).spec()),
        lambda: FastLanguageModel.from_pretrained(str(folder)),
    ):
        with pytest.raises(
            CheckpointError, match=r"q_proj\.lora_A\.weight must hold finite values, got 1 others, the first (nan|inf)"
        ):
            door()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]},
            r"lacks .*layers\.0\.mlp\.up_proj\.lora_A\.weight.*\(4 missing\)",
        ),
        (
            {"exclude_modules": ["v_proj"]},
            r"has .*layers\.1\.self_attn\.v_proj\.lora_A\.weight, .*which the model does not train",
        ),
        ({"rank_pattern": {}}, r"down_proj\.lora_A\.weight must have the shape \(4, 128\), got \(2, 128\)"),
        ({"target_modules": ["nothing"]}, "target_modules must match a linear layer of the model, got nothing"),
        ({"use_dora": True}, "use_dora must be false, got true: it is not supported"),
        ({"r": 4.5}, "r must be a positive integer below 2\\^31, got 4.5"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be .*got inf"),
        ({"bias": "weird"}, "bias must be 'none', 'all' or 'lora_only', got 'weird'"),
        ({"target_modules": "(", "layers_to_transform": None}, "must be a regular expression"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base"),
    ],
)
def test_adapters_whose_config_and_tensors_differ(theirs, tmp_path, config, message):
    folder = damaged(theirs[2], tmp_path / "adapter", config)
    with pytest.raises(CheckpointError, match=message):
        FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False)


ENDLESS = r"([a-z0-9_]+\.?)+\!"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"target_modules": ENDLESS, "layers_to_transform": None}, "target_modules"),
        ({"exclude_modules": ENDLESS}, "exclude_modules"),
        ({"modules_to_save": [ENDLESS]}, "modules_to_save"),
        ({"layers_pattern": [ENDLESS]}, "layers_pattern"),
        ({"rank_pattern": {ENDLESS: 2}}, "rank_pattern"),
        ({"alpha_pattern": {ENDLESS: 2}}, "alpha_pattern"),
    ],
)
def test_expressions_that_never_end_are_refused(theirs, tmp_path, config, field, monkeypatch):
    """Matching can't be interrupted: without the trial this test would hang."""
    monkeypatch.setattr(foreign, "EXPRESSION_SECONDS", 0.5)
    folder = damaged(theirs[2], tmp_path / "adapter", config)
    with pytest.raises(CheckpointError, match=rf"adapter: {field}: the expression .* takes more than 0.5 s"):
        FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False)


def cached(hub, name, folder):
    """A folder as huggingface_hub keeps a repository's files."""
    root = hub / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, root / "snapshots" / ("a" * 40))


def test_adapters_and_bases_are_found_by_their_hub_names_offline(theirs, tmp_path, monkeypatch):
    base, _, adapter = theirs
    renamed = damaged(adapter, tmp_path / "adapter", {"base_model_name_or_path": "someone/base"})
    cached(tmp_path / "hub", "someone/base", base)
    cached(tmp_path / "hub", "someone/adapter", renamed)
    hub = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    model, _ = FastLanguageModel.from_pretrained("someone/adapter", load_in_4bit=False, **hub)
    assert model.config.name_or_path == "someone/base"
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_16bit")
    assert peft.PeftConfig.from_pretrained(tmp_path / "again").base_model_name_or_path == "someone/base"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert base_model_of(find_adapter("someone/adapter")) == "someone/base"
    assert find_adapter("someone/base") is None


def test_a_run_names_its_base_by_the_name_it_was_asked_for(tmp_path):
    name = Path(write_checkpoint(tmp_path / "base", num_hidden_layers=1))
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    recipe = tiny_recipe(name, rows, tmp_path / "run", steps=1)
    plan = make_plan(recipe, replace(open_checkpoint(name), name="someone/base"))
    assert plan.base_model == "someone/base"
