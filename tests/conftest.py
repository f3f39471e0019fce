"""Shapes and dtypes in signatures are checked while tests run, and only then; JAX compiles a program once a session."""

from __future__ import annotations

import os
import tempfile

import pytest
from jaxtyping import install_import_hook

install_import_hook(["jaxsloth.kernels"], "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    """A folder of compiled programs, for this session alone: no test meets what another version of JAX or the code compiled.

    Workers, and the processes that tests start, have it from the session's environment. On a GPU the backend chooses a folder.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or config.option.markexpr == "gpu":
        return
    folder = tempfile.TemporaryDirectory(prefix="jaxsloth-programs-")
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
