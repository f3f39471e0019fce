"""JAX decodes where it has several devices: what it says there is what it says on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.decoding_program import answers

ROOT = Path(__file__).resolve().parents[2]


def test_two_devices_say_what_one_says():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.support.decoding_program"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 2
    assert found["answers"]["fused"] == found["answers"]["composed"] == answers()["composed"]
