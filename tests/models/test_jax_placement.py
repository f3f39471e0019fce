"""Where the JAX backend keeps what it has compiled."""

from __future__ import annotations

import jax
import pytest

from jaxsloth.jax_backend import placement


@pytest.fixture
def configured():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("where", "chosen", "expected"), [("cuda", None, "jaxsloth/xla"), ("cuda", "mine", "mine"), ("cpu", None, None)]
)
def test_programs_are_kept_for_a_gpu(monkeypatch, tmp_path, configured, where, chosen, expected):
    monkeypatch.setattr(placement, "platform", lambda: where)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", chosen)
    placement.keep_compiled_programs()
    found = jax.config.jax_compilation_cache_dir
    assert found == (str(tmp_path / expected) if expected == "jaxsloth/xla" else expected)
