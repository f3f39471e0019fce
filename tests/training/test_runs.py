"""What a run leaves behind, and what does not change its numbers."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from jaxsloth.backend import BACKENDS
from jaxsloth.recipe import Recipe
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.log import read_log
from jaxsloth.training.run import choose_backend, train

BAR = 1e-5


def losses(result):
    return np.array([entry["loss"] for entry in result.entries if "loss" in entry])


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulation_layouts_have_one_curve(tiny, tmp_path, backend):
    """The loop's part in it; tests/models/test_backends.py has rows one by one too."""
    found = {}
    for batch, accumulation in ((8, 1), (2, 4)):
        recipe = tiny.recipe(
            tmp_path / f"{batch}x{accumulation}", backend=backend, batch_size=batch, accumulation=accumulation, steps=4
        )
        found[batch] = losses(train(recipe, quiet=True))  # 22 rows: the third step of an epoch is short
    assert found[8].shape == (4,)
    np.testing.assert_allclose(found[2], found[8], rtol=0, atol=BAR)


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "run"
    data = {"path": str(tiny.rows), "max_length": 64, "validation_fraction": 0.2}
    section = {"output": str(output), "every": 2, "keep": 1, "best": True}
    # Trained far too fast, so that the best held-out loss is not the last.
    optimizer = {"learning_rate": 0.1, "max_grad_norm": None}
    recipe = tiny.recipe(
        output,
        data=data,
        checkpoints=section,
        evaluation={"every": 1, "batch_size": 3},
        optimizer=optimizer,
        log_every=2,
        steps=4,
        schedule={"kind": "constant"},
    )
    return recipe, train(recipe, quiet=True)


def test_the_files_of_a_run(evaluated):
    recipe, result = evaluated
    assert {"adapter", "log.jsonl", "loss.png", "recipe.yaml"} < {entry.name for entry in result.output.iterdir()}
    assert Recipe.model_validate(yaml.safe_load((result.output / "recipe.yaml").read_text())) == recipe
    entries = read_log(result.output / "log.jsonl")
    assert entries == result.entries
    assert [e["step"] for e in entries if "loss" in e] == [2, 4]
    assert [e["step"] for e in entries if "eval_loss" in e] == [1, 2, 3, 4]
    fields = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s", "seconds"}
    assert all(set(e) == fields for e in entries if "loss" in e)
    state = json.loads((result.output / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["recipe"]["seed"] == recipe.seed


def test_the_best_adapter_is_the_one_that_is_kept_and_written(tiny, evaluated):
    _, result = evaluated
    held_out = {e["step"]: e["eval_loss"] for e in result.entries if "eval_loss" in e}
    best = min(held_out, key=held_out.__getitem__)
    assert best != 4, "the run was to get worse after its best step"
    assert checkpoints.steps_saved(result.output) == [best, 4]
    kept = checkpoints.load(result.output / f"checkpoint-{best}").adapter
    judge = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32), result.output / "adapter"
    )
    theirs = {n.replace(".default.", "."): p.numpy() for n, p in judge.named_parameters() if "lora_" in n}
    assert theirs.keys() == kept.keys()
    for name, value in kept.items():
        np.testing.assert_array_equal(theirs[name], value)


def test_the_summary_names_what_was_reached(evaluated):
    _, result = evaluated
    out = io.StringIO()
    Console(file=out, width=200).print(result.summary_table())
    losses = f"{result.first_loss:.4f} → {result.final_loss:.4f}"
    for part in (losses, f"{result.eval_loss:.4f}", f"{result.tokens:,} in", str(result.output), "GiB"):
        assert part in out.getvalue()


def test_epochs_become_steps(tiny, tmp_path):
    result = train(tiny.recipe(tmp_path / "run", steps=None, epochs=1.5), quiet=True)
    assert result.steps == 9  # 22 rows, 4 a step: 6 steps an epoch


@pytest.mark.parametrize(
    ("seen", "expected"), [((), "jax"), (("torch",), "torch"), (("jax",), "jax"), (("torch", "jax"), "jax")]
)
def test_auto_takes_the_backend_that_sees_an_accelerator(monkeypatch, seen, expected):
    class Fake:
        def __init__(self, name):
            self.name = name

        def devices(self):
            return type("Devices", (), {"platform": "cuda" if self.name in seen else "cpu"})

    monkeypatch.setattr("jaxsloth.training.run.load_backend", Fake)
    assert choose_backend("auto").name == expected


def test_auto_takes_the_backend_that_is_installed(monkeypatch):
    monkeypatch.setattr("jaxsloth.training.run.missing_packages", lambda name: ["jax"] if name == "jax" else [])
    assert choose_backend("auto").name == "torch"
