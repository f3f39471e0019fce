"""Several devices train as one does: the same losses, held-out losses and adapter, with unequal lengths and short batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsloth.backend import BACKENDS
from jaxsloth.convert.peft_adapter import read_adapter
from jaxsloth.recipe import Recipe
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.log import read_log
from jaxsloth.training.run import train
from tests.support.tiny import tiny_recipe, write_checkpoint, write_rows

ROOT = Path(__file__).resolve().parents[2]
BAR = 1e-5
STEPS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, rows = write_checkpoint(folder / "model"), write_rows(folder / "rows.jsonl")

    def make(output: Path, backend: str) -> Recipe:
        # 15 rows to train on, of unequal lengths: the last step of an epoch has 3 of its 6, so that a micro-batch is empty, and
        # 3 rows don't divide among 2 or 4 devices. Held out are 7 rows, 5 of them in the first batch.
        return tiny_recipe(
            model,
            rows,
            output,
            backend=backend,
            batch_size=3,
            accumulation=2,
            steps=STEPS,
            data={"path": str(rows), "max_length": 64, "pad_to_multiple_of": 16, "validation_fraction": 0.3},
            evaluation={"every": STEPS // 2, "batch_size": 5},
            optimizer={"learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
        )

    return make


def curves(output: Path) -> dict[str, np.ndarray]:
    entries = read_log(output / "log.jsonl")
    return {key: np.array([e[key] for e in entries if key in e]) for key in ("loss", "grad_norm", "eval_loss", "eval_tokens")}


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    """The output folders of the runs on one device."""
    outputs = {}
    for backend in BACKENDS:
        outputs[backend] = tmp_path_factory.mktemp("one") / backend
        train(recipe(outputs[backend], backend), quiet=True)
    return outputs


@pytest.mark.parametrize(("backend", "devices"), [("torch", 2), ("jax", 2), ("jax", 4)])
def test_many_devices_equal_one(recipe, one, tmp_path, backend, devices):
    output = tmp_path / "run"
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(output, backend).to_yaml(), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable]
    if backend == "torch":
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    else:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [*launch, "-m", "jaxsloth", "train", str(file), "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert checkpoints.load(output / f"checkpoint-{STEPS}").state.devices == devices
    found, expected = curves(output), curves(one[backend])
    assert found["loss"].shape == (STEPS,)
    for key in ("loss", "eval_loss", "eval_tokens"):
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=BAR, err_msg=key)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)
    ours, theirs = (read_adapter(folder / "adapter")[1] for folder in (output, one[backend]))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-4, err_msg=name)
