"""TRL's trainer over the torch module of either backend, in two processes of torchrun: what it makes of transformers' model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("others_trainers.py")


@pytest.mark.slow
def test_trls_trainer_in_two_processes(tmp_path):
    """The processes have other rows, and gradients are summed over them; placeholders are not sent."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command = [*launch, str(write_checkpoint(tmp_path / "model")), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))
    judge = found.pop("transformers")
    assert len(judge["loss"]) == 6 and max(judge["loss"]) - min(judge["loss"]) > 0.1
    for backend, ours in found.items():
        for key, values in judge.items():
            assert ours[key] == pytest.approx(values, rel=1e-5, abs=1e-5), (backend, key)
