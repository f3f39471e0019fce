"""A run that goes on, on its own backend or the other, has the uninterrupted run's curve."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jaxsloth.backend import BACKENDS
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.log import read_log
from jaxsloth.training.records import RunResult
from jaxsloth.training.run import train

BAR = 1e-5
HALF, WHOLE = 10, 20


@dataclass(frozen=True)
class Run:
    output: Path
    result: RunResult
    losses: np.ndarray


def recipe(tiny, output, backend):
    return tiny.recipe(
        output,
        backend=backend,
        steps=WHOLE,
        optimizer={"learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 0.5},
        checkpoints={"output": str(output), "every": HALF},
    )


def losses(output):
    return np.array([entry["loss"] for entry in read_log(output / "log.jsonl") if "loss" in entry])


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The uninterrupted run of each backend."""
    runs = {}
    for backend in BACKENDS:
        output = tmp_path_factory.mktemp("whole") / backend
        result = train(recipe(tiny, output, backend), quiet=True)
        runs[backend] = Run(output, result, losses(output))
    return runs


def test_the_backends_have_one_curve(whole):
    assert whole["torch"].losses.shape == whole["jax"].losses.shape == (WHOLE,)
    np.testing.assert_allclose(whole["torch"].losses, whole["jax"].losses, rtol=0, atol=BAR)
    assert whole["torch"].losses[:5].mean() - whole["torch"].losses[-5:].mean() > 0.3  # it learns, with clipping and dropout
    norms = [entry["grad_norm"] for entry in read_log(whole["torch"].output / "log.jsonl")]
    assert min(norms) < max(norms)
    assert np.mean(np.array(norms) > 0.5) > 0.5


@pytest.mark.parametrize(("first", "second"), [("torch", "jax"), ("jax", "torch")])
def test_a_run_goes_on_on_the_other_backend(tiny, whole, tmp_path, first, second):
    output = tmp_path / "run"
    source = whole[first].output
    for name in (f"checkpoint-{HALF}", "log.jsonl", "recipe.yaml"):  # as a kill in the second half would have left it
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        output.mkdir(exist_ok=True)
        copy(source / name, output / name)
    result = train(recipe(tiny, output, second), resume=True, quiet=True)
    assert checkpoints.load(output / f"checkpoint-{WHOLE}").state.backend == second
    found = losses(output)
    np.testing.assert_array_equal(found[:HALF], whole[first].losses[:HALF])
    for judge in BACKENDS:
        np.testing.assert_allclose(found[HALF:], whole[judge].losses[HALF:], rtol=0, atol=BAR, err_msg=f"against {judge}")
    assert (result.steps, result.tokens) == (WHOLE, whole[first].result.tokens)


def test_without_the_optimizer_s_state_the_curve_is_another(tiny, whole, tmp_path):
    """The bar can be missed: the adapter alone is not enough."""
    output = tmp_path / "run"
    shutil.copytree(whole["torch"].output, output)
    shutil.rmtree(output / f"checkpoint-{WHOLE}")
    saved = checkpoints.load(output / f"checkpoint-{HALF}")
    from safetensors.numpy import save_file

    forgotten = {name: value if name == "count" else np.zeros_like(value) for name, value in saved.optimizer.items()}
    save_file(forgotten, saved.folder / checkpoints.STATE)
    train(recipe(tiny, output, "torch"), resume=True, quiet=True, resume_anyway=("files",))
    assert np.abs(losses(output)[HALF:] - whole["torch"].losses[HALF:]).max() > 100 * BAR


@pytest.mark.parametrize("quantization", ["none", "nf4-nested"])
def test_stopping_and_going_on_equals_not_stopping(tiny, tmp_path, quantization):
    def of(name):
        return tiny.recipe(tmp_path / name, steps=8, quantization=quantization)

    train(of("whole"), quiet=True)
    stopped = train(of("parts"), stop_after=3, quiet=True)
    assert stopped.steps == 3
    assert (tmp_path / "parts" / "adapter").is_dir()
    train(of("parts"), resume=True, quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("first", "second", "bar"), [("torch", "torch", 1e-6), ("torch", "jax", 2e-4), ("jax", "torch", 2e-4)])
def test_an_8_bit_run_goes_on(tiny, tmp_path, first, second, bar):
    """Its codes and maxima go through the checkpoint; on the other backend, codes on a tie may fall to the other side."""

    def of(name, backend, optimizer="adamw_8bit"):
        settings = {"name": optimizer, "learning_rate": 1e-3, "weight_decay": 0.1}
        return tiny.recipe(tmp_path / name, backend=backend, steps=6, lora={"r": 65, "alpha": 65}, optimizer=settings)

    train(of("whole", first), quiet=True)
    train(of("parts", first), stop_after=3, quiet=True)
    saved = checkpoints.load(tmp_path / "parts" / "checkpoint-3").optimizer
    kinds = {key: {v.dtype.name for n, v in saved.items() if n.endswith(key)} for key in (".exp_avg", "_absmax")}
    assert kinds == {".exp_avg": {"uint8", "float32"}, "_absmax": {"float32"}}
    with pytest.raises(ValueError, match=r"optimizer.name: 'adamw_8bit' -> 'adamw'"):
        train(of("parts", second, "adamw"), resume=True, quiet=True)
    train(of("parts", second), resume=True, quiet=True)
    found = checkpoints.load(tmp_path / "parts" / "checkpoint-6").optimizer
    assert found.keys() == checkpoints.load(tmp_path / "whole" / "checkpoint-6").optimizer.keys()
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=0, atol=bar)
