"""`device_map` with a number: the model on that device alone, by both backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jaxsloth import FastLanguageModel
from jaxsloth.device_choice import DeviceChoice
from jaxsloth.torch_backend import BACKEND, devices
from tests.support.modules import BACKENDS, adapted, batch, their_base
from tests.support.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# One process' life: a model on device 1, a step and an answer of it, and what is refused. Prints the loss and the answer.
ON_THE_SECOND = """
import sys
import torch
from jaxsloth import FastLanguageModel
from tests.support.modules import adapted, batch

backend, folder, platform = sys.argv[1:]


def load(device_map):
    settings = {"dtype": "float32", "load_in_4bit": False, "max_seq_length": 64}
    return FastLanguageModel.from_pretrained(folder, backend=backend, device_map=device_map, **settings)[0]


def refused(device_map):
    try:
        load(device_map)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{device_map} was to be refused")


assert f"asks for {platform}:7, and backend '{backend}' sees " in refused(f"{platform}:7")
model = adapted(load({"": 1})).eval()
loss = model(**batch()).loss
loss.backward()
assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
answer = model.generate(input_ids=batch()["input_ids"][:1, :9].to(model.device), max_new_tokens=8, pad_token_id=1)
load({"": f"{platform}:1"})  # the same again
assert f"a model of this process was built for {platform}:1" in refused(f"{platform}:0")
load("auto")
if backend == "jax":
    import jax

    assert {array.devices().pop().id for array in jax.live_arrays() if array.size > 64} == {1}
else:
    assert torch.cuda.current_device() == 1 and torch.cuda.memory_allocated(0) == 0
if platform == "cuda":
    from transformers import Trainer, TrainingArguments

    assert str(model.device) == "cuda:1"
    arguments = TrainingArguments(sys.argv[2] + "-run", max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True)
    rows = [{name: value[0] for name, value in batch().items()}] * 4
    assert 0 < Trainer(model, arguments, train_dataset=rows).train().training_loss < 10
print("said", loss.item(), *answer[0].tolist())
"""


def on_the_second(backend: str, folder: Path, platform: str) -> tuple[float, list[int]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if platform == "cpu":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
        environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_THE_SECOND, backend, str(folder), platform]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = next(line for line in done.stdout.splitlines() if line.startswith("said")).split()
    return float(said[1]), [int(token) for token in said[2:]]


def check_the_second(backend: str, folder: Path, platform: str) -> None:
    judge = adapted(their_base()).eval()
    loss, answer = on_the_second(backend, folder, platform)
    assert abs(loss - float(judge(**batch()).loss)) < 1e-5
    expected = judge.generate(input_ids=batch()["input_ids"][:1, :9], max_new_tokens=8, pad_token_id=1)
    assert answer == expected[0].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("devices") / "model")


def test_jax_runs_on_the_device_that_is_named(folder):
    check_the_second("jax", folder, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_gpu(folder, backend):
    check_the_second(backend, folder, "cuda")


@pytest.fixture
def two_gpus(monkeypatch):
    """torch as it is on a machine with two GPUs; the devices that were made current."""
    current: list[int] = []
    monkeypatch.setattr(devices, "CHOICE", DeviceChoice("torch"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return current


def test_torch_takes_the_device_that_is_named(two_gpus):
    assert devices.device() == torch.device("cuda", 0)
    BACKEND.use_device(1)
    assert devices.device() == torch.device("cuda", 1) and two_gpus == [1]
    BACKEND.use_device(0)  # no model yet: it may still be changed
    devices.CHOICE.built()
    BACKEND.use_device(0)
    assert two_gpus == [1, 0, 0]
    with pytest.raises(ValueError, match=r"cuda:1, and a model of this process was built for cuda:0"):
        BACKEND.use_device(1)
    with pytest.raises(ValueError, match="sees 2 of its kind, numbered from 0; set CUDA_VISIBLE_DEVICES=2"):
        BACKEND.use_device(2)
    assert devices.device() == torch.device("cuda", 0) and two_gpus == [1, 0, 0]


def test_torchruns_device_wins(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    BACKEND.use_device(1)
    assert devices.device() == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device 0, and torchrun gives this process device 1 \(LOCAL_RANK\)"):
        BACKEND.use_device(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_there(folder, backend):
    for device_map in ("cpu:1", {"": 1}):
        with pytest.raises(ValueError, match="sees 1 of its kind"):
            FastLanguageModel.from_pretrained(str(folder), backend=backend, device_map=device_map, load_in_4bit=False)
    model, _ = FastLanguageModel.from_pretrained(str(folder), backend=backend, device_map={"": 0}, load_in_4bit=False)
    assert model.device == torch.device("cpu")
