"""Where the JAX backend keeps what it has compiled, and arrays that come from the host."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsloth.backend import OptimizerOptions
from jaxsloth.jax_backend import devices
from jaxsloth.objectives.causal_lm import CausalLoss
from tests.support.small_models import build


@pytest.fixture
def configured():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("where", "chosen", "expected"), [("cuda", None, "jaxsloth/xla"), ("cuda", "mine", "mine"), ("cpu", None, None)]
)
def test_programs_are_kept_for_a_gpu(monkeypatch, tmp_path, configured, where, chosen, expected):
    monkeypatch.setattr(devices, "platform", lambda: where)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", chosen)
    devices.keep_compiled_programs()
    found = jax.config.jax_compilation_cache_dir
    assert found == (str(tmp_path / expected) if expected == "jaxsloth/xla" else expected)


def test_several_processes_do_not_each_train_the_whole_run(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    model, *_ = build("jax", {"num_hidden_layers": 1})
    assert model.step(CausalLoss(), OptimizerOptions())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started .* start the script by python alone"):
        model.step(CausalLoss(), OptimizerOptions())


@pytest.mark.parametrize("size", [16, 1 << 20])
def test_an_array_shares_no_memory_with_its_source(size):
    """A checkpoint's file is mapped, and may be written over. XLA would take what starts at a multiple of 64 as it is."""
    room = np.zeros(4 * size + 64, np.uint8)
    start = -room.ctypes.data % 64
    source = room[start : start + 4 * size].view(np.float32)
    array = devices.put(source)
    source[:] = 7.0
    assert not np.asarray(array).any()
