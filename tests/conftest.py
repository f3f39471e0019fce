"""Shapes and dtypes in signatures are checked while tests run, and only then; JAX compiles a program once a session."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(["jaxsloth.kernels"], "beartype.beartype")
pytest.register_assert_rewrite("tests.support", "tests.kernels.torch_checks", "tests.kernels.fp8_checks")

TESTS = Path(__file__).parent
# Files that take a minute and more, longest first. Workers take whole files, so the last ones to be taken must be short.
LONG = (
    "kernels/test_triton.py",
    "models/test_backends.py",
    "frontend/test_trainer.py",
    "frontend/test_module_passes.py",
    "training/test_resume.py",
    "distributed/test_data_parallel.py",
    "models/test_optimizer_8bit.py",
    "training/test_runs.py",
    "parity/test_ladder.py",
    "frontend/test_module_model.py",
    "frontend/test_dpo_trainer.py",
)
# Much of a JAX test is LLVM at work on a program that runs a few times: the fast core asks for machine code that is not
# optimized, made the plainest way (at level 0 the derivative of a saturated tanh is 3e-6 off: the slow tests have that case).
# XLA's own passes, which choose what is computed and kept, stay; the slow tests have the defaults.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"


# Cases that take long on two cores, most of them JAX's half of a test whose torch half is fast, and one that needs XLA's
# defaults: the slow tests run them.
SLOW = frozenset((TESTS / "slow_cases.txt").read_text(encoding="utf-8").splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/") in SLOW:
            item.add_marker(pytest.mark.slow)
    places = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_configure(config: pytest.Config) -> None:
    """A folder of compiled programs, for this session alone: no test meets what another version of JAX or the code compiled.

    Workers, and the processes that tests start, have it from the session's environment. On a GPU the backend chooses a folder.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or config.option.markexpr == "gpu":
        return
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    folder = tempfile.TemporaryDirectory(prefix="jaxsloth-programs-")
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
