"""The written passes with LoRA dropout against autograd of the composed ops, which draw the same masks."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxsloth.backend import BuildOptions, OptimizerOptions
from jaxsloth.jax_backend import mlp as jax_mlp
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.torch_backend import mlp as torch_mlp
from tests.support.small_models import VOCAB, build
from tests.support.sources import examples, stream

FUSED = {"train_pass": "fused"}
CHANGES = {"num_hidden_layers": 2, "intermediate_size": 128}
SOME = ["q_proj", "v_proj", "o_proj", "up_proj", "model.layers.1.mlp.down_proj"]
STEPS = 3


def curves(backend: str, packing: bool, options: BuildOptions | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradient norms of some steps, two micro-batches each."""
    model, *_ = build(backend, CHANGES, lora={"dropout": 0.3, "targets": SOME}, options=options)
    step_batches = stream(examples(16, VOCAB), batch_size=2, accumulation=2, packing=packing)
    step = model.step(CausalLoss(), OptimizerOptions(weight_decay=0.1))
    results = [step(step_batches.batch(index), learning_rate=1e-2, step=index, seed=9) for index in range(STEPS)]
    losses, norms = np.array([result.floats()[:2] for result in results]).T
    return losses, norms


@pytest.fixture(scope="module")
def judges():
    """By whether documents are packed."""
    found = {packing: curves("torch", packing) for packing in (False, True)}
    assert not np.allclose(found[False][0], found[True][0], atol=1e-3)
    return found


def assert_same(found: tuple[np.ndarray, np.ndarray], judge: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(found[0], judge[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], judge[1], rtol=2e-5)


@pytest.mark.parametrize(
    ("mode", "packing", "tile"),
    [("none", False, None), ("none", True, None), ("selective", False, 13), ("offload", False, None), ("full", True, 13)],
)
def test_torch(mode, packing, tile, judges, monkeypatch):
    """tile: tokens of the MLP that are handled at once."""
    if tile is not None:
        monkeypatch.setattr(torch_mlp, "MLP_TILE", 256 * tile)
    options = BuildOptions(gradient_checkpointing=mode, implementations=FUSED)
    assert_same(curves("torch", packing, options), judges[packing])


@pytest.mark.parametrize(
    ("mode", "packing", "tile", "loop"),
    [
        ("none", False, None, "scan"),
        pytest.param("none", True, None, "unrolled", marks=pytest.mark.slow),
        pytest.param("full", True, 13, "scan", marks=pytest.mark.slow),
    ],
)
def test_jax(mode, packing, tile, loop, judges, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(jax_mlp, "MLP_TILE", 256 * tile)
    jax.clear_caches()  # the size of tiles is no argument of the programs
    options = BuildOptions(gradient_checkpointing=mode, implementations=FUSED | {"layer_loop": loop})
    assert_same(curves("jax", packing, options), judges[packing])
    jax.clear_caches()
