"""kill -9 at any moment: --resume goes on from the last whole checkpoint, and the curve is the uninterrupted run's."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxsloth.recipe import make_recipe
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.log import read_log
from jaxsloth.training.run import train
from tests.support.tiny import recipe_values

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("begun", "adapter", "state", "described", "renamed")
KILLED = -signal.SIGKILL


def losses(output):
    entries = [entry for entry in read_log(output / "log.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))  # one curve: no step twice, none missing
    return np.array([entry["loss"] for entry in entries])


def checkpoint_values(output, step):
    saved = checkpoints.load(output / f"checkpoint-{step}")
    return saved.adapter | saved.optimizer


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_kill_at_every_stage_of_a_save(tiny, tmp_path):
    def values(output):
        return recipe_values(tiny.model, tiny.rows, output, checkpoints={"output": str(output), "every": 2, "keep": 2})

    def job(output, kill_at=None, resume=False):
        return {"recipe": values(output), "kill_at": kill_at, "resume": resume}

    # The first save: nothing is there to go on from. After the third, of the last step, only the adapter is missing.
    moments = [("described", 1), *((stage, 2) for stage in STAGES), ("renamed", 3)]
    outputs = {(stage, save): tmp_path / f"{stage}-{save}" for stage, save in moments}
    jobs = [job(tmp_path / "whole")]
    for kill_at, output in outputs.items():
        jobs += [job(output, kill_at), job(output, resume=True)]
    command = [sys.executable, str(Path(__file__).with_name("forked_runs.py"))]
    done = subprocess.run(
        command,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        check=True,
        timeout=300,
    )
    assert json.loads(done.stdout) == [0] + [KILLED, 0] * len(outputs), done.stderr
    expected, final = losses(tmp_path / "whole"), checkpoint_values(tmp_path / "whole", 6)
    whole_files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert whole_files == ["adapter", "checkpoint-4", "checkpoint-6", "log.jsonl", "loss.png", "recipe.yaml"]
    for output in outputs.values():
        np.testing.assert_allclose(losses(output), expected, rtol=0, atol=1e-6, err_msg=output.name)
        for name, value in checkpoint_values(output, 6).items():
            np.testing.assert_allclose(value, final[name], rtol=1e-4, atol=1e-6, err_msg=f"{output.name} {name}")
        assert sorted(p.name for p in output.iterdir()) == whole_files  # no temporary is left


def wait_for_step(output, step, process):
    log = output / "log.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(read_log(log)) >= step:
            return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_ten_kills_at_random_moments(tiny, tmp_path, backend):
    steps, kills, generator = 60, 10, random.Random(f"kills of {backend}")
    output = tmp_path / "killed"
    settings = {"steps": steps, "backend": backend}
    whole = make_recipe(recipe_values(tiny.model, tiny.rows, tmp_path / "whole", **settings))
    train(whole, quiet=True)
    section = {"output": str(output), "every": 1, "keep": 2}
    recipe = make_recipe(recipe_values(tiny.model, tiny.rows, output, checkpoints=section, **settings))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    moments = sorted(generator.sample(range(2, steps - 4), kills))
    for number, moment in enumerate(moments):
        resume = ["--resume"] if number else []
        command = [sys.executable, "-m", "jaxsloth", "train", str(file), "--quiet", *resume]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
        wait_for_step(output, moment, process)
        time.sleep(generator.uniform(0.0, 0.05))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == KILLED, errors
        assert checkpoints.latest(output) is not None
    train(recipe, resume=True, quiet=True)
    np.testing.assert_allclose(losses(output), losses(tmp_path / "whole"), rtol=0, atol=1e-6)
    assert not list(output.glob(".tmp-*"))
