"""bitsandbytes' 8-bit folders: its own codes to the bit, read by transformers, and read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jaxsloth.convert.report import describe
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.frontend.loading import load
from tests.support.tiny import write_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(24)[None]


def run(source, destination, to, **options):
    return convert(plan(str(source), destination, to, Options(**options)))


def logits(path, **settings):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **settings)(IDS).logits.float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, with a row of zeros and one of huge values."""
    folder = write_checkpoint(tmp_path_factory.mktemp("int8") / "model", num_hidden_layers=2)
    weights = load_file(folder / "model.safetensors")
    weights[NAME][3] = 0
    weights[NAME][5] *= 1e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("written") / "int8", "bnb-8bit")


def test_codes_are_bitsandbytes_own(folder, written):
    stored = load_file(written / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            assert np.array_equal(stored[name], weight)
            continue
        codes, scale, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
        module = name.removesuffix(".weight")
        assert stored[name].dtype == np.int8 and np.array_equal(stored[name], codes.numpy())
        assert np.array_equal(stored[f"{module}.SCB"], scale.numpy()) and stored[f"{module}.weight_format"] == 0


def test_transformers_loads_it_as_what_it_quantizes_itself(folder, written, tmp_path):
    """The same logits, and the same files where it saves its own; both are read back as bitsandbytes dequantizes."""
    settings = BitsAndBytesConfig(load_in_8bit=True)
    own = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected = own(IDS).logits.float()
    assert torch.equal(logits(written, dtype=torch.float32), expected)
    own.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(path / "model.safetensors") for path in (written, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name
    plain = load_file(run(tmp_path / "theirs", tmp_path / "plain", "hf", dtype="float32") / "model.safetensors")
    for name, value in plain.items():
        if "proj" in name:
            codes, scale = (torch.from_numpy(theirs[key]) for key in (name, name.replace("weight", "SCB")))
            assert np.array_equal(value, functional.int8_vectorwise_dequant(codes, scale).numpy())
    again = load_file(run(written, tmp_path / "again", "bnb-8bit") / "model.safetensors")
    assert all(np.array_equal(again[name], value) for name, value in ours.items())
    assert describe(str(written))["tensors"][NAME]["dtype"] == "INT8"


def test_loading_says_what_to_do(written):
    with pytest.raises(CheckpointError, match=r"bitsandbytes' 8 bits.*jaxsloth convert .* --to hf"):
        load(str(written), backend="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SCB": np.ones(7, np.float32)}, r"up_proj\.SCB must hold 128 floating-point numbers, one a row"),
        ({"SCB": np.full(128, np.nan, np.float32)}, r"up_proj\.SCB must hold finite values"),
        ({"weight": np.ones((128, 64), np.float32)}, r"up_proj\.weight must be a matrix of int8, got F32"),
        ({"weight": None}, r"tensor .*up_proj\.weight is missing beside"),
        ({"SCB": None, "weight_format": None}, r"up_proj\.weight must be stored as floating-point numbers .* got I8"),
        ({"weight_format": np.array(2, np.uint8)}, r"weight_format must be 0 \(row by row\), got \[2\]"),
    ],
)
def test_damaged_folders_are_refused(written, tmp_path, change, message):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text((written / "config.json").read_text())
    tensors = load_file(written / "model.safetensors")
    for part, value in change.items():
        name = NAME.replace("weight", part)
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        run(folder, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
