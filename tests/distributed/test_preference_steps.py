"""Several devices train on pairs of answers as one does: the same losses, log-probs and adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.preference_steps import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_two_devices_equal_one(backend, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable]
    if backend == "torch":
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    command = [*launch, "-m", "tests.support.preference_steps", backend, str(tmp_path / "two.npz")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 devices" in done.stdout
    found = np.load(tmp_path / "two.npz")
    for name, expected in run(backend).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
