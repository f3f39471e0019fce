"""A wheel holds the symlinked folders as real files."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    code = ("kernels/nf4/contract.py", "torch_backend/model.py", "convert/merge.py", "jax_backend/model.py")
    for file in (*code, "py.typed", "data/jinja/chatml.jinja"):
        assert f"jaxsloth/{file}" in names
    assert not any(name.startswith(("kernels/", "torch_backend/", "convert/", "tests/")) for name in names)
