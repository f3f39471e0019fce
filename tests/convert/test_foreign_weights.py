"""Weights in others' formats: pytorch_model.bin, safely or not at all, and scaled float8."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxsloth.convert import pytorch_source
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.digest import base_digest
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from tests.support.tiny import write_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"


def run(source, destination, to="hf", **options):
    return convert(plan(str(source), destination, to, Options(**options)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("foreign") / "model", num_hidden_layers=2)


def without_weights(folder, target):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def weights(folder):
    return {name: torch.from_numpy(value) for name, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickles_are_read_as_torch_saved_them(folder, tmp_path, dtype):
    """One file and two with an index, transposed tensors too; the dtype is kept."""
    found = {name: value.to(dtype) for name, value in weights(folder).items()}
    found[NAME] = found[NAME].t().contiguous().t()
    one = without_weights(folder, tmp_path / "one")
    torch.save(found, one / "pytorch_model.bin")
    two = without_weights(folder, tmp_path / "two")
    names, where = sorted(found), {}
    for number, part in enumerate((names[:7], names[7:])):
        torch.save({name: found[name] for name in part}, two / f"pytorch_model-{number}.bin")
        where |= dict.fromkeys(part, f"pytorch_model-{number}.bin")
    (two / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    for source in (one, two):
        out = run(source, tmp_path / f"{source.name}-hf")
        stored = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
        assert all(torch.equal(stored[name], value) and stored[name].dtype == dtype for name, value in found.items())
    digests = {base_digest(open_checkpoint(source)) for source in (one, two)}
    torch.save(found | {NAME: found[NAME] + 1}, one / "pytorch_model.bin")
    assert len(digests | {base_digest(open_checkpoint(one))}) == 3
    (two / "pytorch_model-1.bin").unlink()
    with pytest.raises(CheckpointError, match=r"must name files that are there; missing: pytorch_model-1\.bin"):
        open_checkpoint(two)


class Evil:
    """What pickle runs os.system for."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles_that_ask_for_more_are_refused_and_not_run(folder, tmp_path, monkeypatch):
    source, file = without_weights(folder, tmp_path / "model"), tmp_path / "model" / "pytorch_model.bin"
    torch.save(weights(folder) | {"more": Evil(f"touch {tmp_path / 'ran'}")}, file)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: .*nothing of it was run"):
        run(source, tmp_path / "out")
    torch.save(weights(folder), file)
    whole = file.read_bytes()
    for content, message in (
        (pickle.dumps(Evil(f"touch {tmp_path / 'ran'}")), "is not a whole file of torch.save's zip format|is refused"),
        (whole[: len(whole) // 2], "is not a whole file of torch.save's zip format"),
        (b"", "is not a whole file of torch.save's zip format"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            run(source, tmp_path / "out")
    torch.save({"model": weights(folder)}, file)
    with pytest.raises(CheckpointError, match="must hold tensors by name, got dict with other things"):
        run(source, tmp_path / "out")
    monkeypatch.setattr(pytorch_source, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"holds pickles .*pip install 'jaxsloth\[torch\]'"):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pickles_come_from_the_hub_where_nothing_else_is_there(folder, tmp_path, monkeypatch):
    source = without_weights(folder, tmp_path / "hub")
    torch.save(weights(folder), source / "pytorch_model.bin")
    asked = []

    def snapshot_download(name, allow_patterns, **settings):
        asked.append(allow_patterns)
        here = tmp_path / "cache"
        here.mkdir(exist_ok=True)
        for file in source.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    stored = load_file(run("someone/model", tmp_path / "out") / "model.safetensors")
    assert np.array_equal(stored[NAME], weights(folder)[NAME].numpy()) and len(asked) == 2


def scaled(folder, target, block, quantization, ending, shape=None):
    """The folder with its linear layers in e4m3, a scale a block; (the folder, what they stand for in float64, its tensors)."""
    without_weights(folder, target)
    config = json.loads((target / "config.json").read_text()) | {"quantization_config": quantization}
    (target / "config.json").write_text(json.dumps(config))
    found, expected = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        found[name] = expected[name] = value
        if "proj" not in name:
            continue
        rows, columns = (size if part is None else part for size, part in zip(value.shape, block, strict=True))
        grid = -(-value.shape[0] // rows), -(-value.shape[1] // columns)
        scale = np.zeros(grid, np.float32)
        codes, whole = np.zeros(value.shape, ml_dtypes.float8_e4m3fn), np.zeros(value.shape)
        for i in range(grid[0]):
            for j in range(grid[1]):
                place = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                scale[i, j] = np.abs(value[place]).max() / 448
                codes[place] = (value[place] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
                whole[place] = codes[place].astype(np.float64) * scale[i, j].astype(np.float64)
        found[name], expected[name] = codes, whole
        found[f"{name}{ending}"] = scale if shape is None else scale.reshape(shape)
        if ending == "_scale":
            found[name.replace("weight", "input_scale")] = np.ones(1, np.float32)
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    return target, expected, found


def groups(**weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"} | weights}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("block", "quantization", "ending", "shape"),
    [
        ((32, 32), {"quant_method": "fp8", "weight_block_size": [32, 32]}, "_scale_inv", None),
        ((48, 40), {"quant_method": "fp8", "weight_block_size": [48, 40]}, "_scale_inv", None),
        ((None, None), groups(strategy="tensor"), "_scale", (1,)),
        ((1, None), groups(strategy="channel"), "_scale", None),
        ((48, 32), groups(strategy="block", block_structure=[48, 32]), "_scale", None),
    ],
    ids=["fp8", "fp8 with rests", "a matrix", "a row", "a block"],
)
def test_scaled_float8_is_dequantized(folder, tmp_path, block, quantization, ending, shape):
    source, expected, _ = scaled(folder, tmp_path / "fp8", block, quantization, ending, shape)
    out = run(source, tmp_path / "hf", dtype="float32")
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(stored[name] - value).max() <= 2**-24 * np.abs(value).max(), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_transformers_dequantizes_to_the_same(folder, tmp_path):
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic", "dequantize": True}
    source, _, _ = scaled(folder, tmp_path / "fp8", (32, 32), quantization, "_scale_inv")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map="cpu").state_dict()
    stored = load_file(run(source, tmp_path / "hf", dtype="float32") / "model.safetensors")
    for name, value in stored.items():
        assert torch.equal(theirs[name], torch.from_numpy(value)), name


def test_damaged_float8_is_refused(folder, tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    source, _, good = scaled(folder, tmp_path / "fp8", (32, 32), fp8, "_scale_inv")
    file, scale = source / "model.safetensors", f"{NAME}_scale_inv"
    for change, message in (
        ({scale: None}, r"is float8, and neither .*_scale_inv nor .*_scale is there"),
        ({scale: np.ones((4, 3), np.float32)}, r"must hold a scale for blocks of 32 × 32 of .* got \(4, 3\)"),
        ({scale: np.full((4, 2), np.inf, np.float32)}, "must hold finite values"),
        ({scale: np.ones((4, 2), np.int32)}, "with scales in F32, BF16 or F16, got .* I32"),
    ):
        save_file({name: value for name, value in (good | change).items() if value is not None}, file)
        with pytest.raises(CheckpointError, match=message):
            run(source, tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    for quantization, message in (
        (None, r"must be stored as floating-point numbers|has no place for"),
        (fp8 | {"weight_block_size": "128"}, "weight_block_size must be two positive integers, got '128'"),
        (groups() | {"config_groups": {}}, "config_groups must describe weights"),
        (groups() | {"format": "pack-quantized"}, "quantization 'compressed-tensors' can't be read"),
    ):
        (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(CheckpointError, match=message):
            run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]
