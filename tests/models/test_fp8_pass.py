"""The fused pass with its frozen products in 8 bits: exact where nothing is rounded, and near it where e4m3 rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxsloth.backend import BuildOptions, OptimizerOptions
from jaxsloth.kernels.fp8 import torch_ops
from jaxsloth.kernels.registry import RefusedError
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.torch_backend import fp8, mlp
from jaxsloth.torch_backend.written_program import WrittenProgram
from tests.support.small_models import VOCAB, build
from tests.support.sources import examples, first_batch, stream

FUSED = {"train_pass": "fused"}
BAR = 3e-5  # as the exact pass': sums of another order
ADAPTED = [
    {},
    {"targets": ["q_proj", "v_proj"]},
    {"targets": ["up_proj"], "r": 70},
    {"targets": ["model.layers.2.mlp.down_proj"]},
]


def gradients(compute="exact", dtype="float32", mode="none", changes=None, **how):
    options = BuildOptions(dtype=dtype, gradient_checkpointing=mode, implementations=FUSED, compute=compute)
    return build("torch", changes, options=options, **how)[0].gradients(first_batch(stream(examples(4, VOCAB))))


def furthest(ours, theirs) -> float:
    return max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items())


@pytest.fixture
def unrounded(monkeypatch):
    """Everything but the rounding: scales, factors, margins, both orientations."""
    monkeypatch.setattr(torch_ops, "E4M3", torch.float32)
    monkeypatch.setattr(fp8, "check_options", lambda options, device: None)


@pytest.mark.parametrize("mode", ["none", "full", *(pytest.param(m, marks=pytest.mark.slow) for m in ("selective", "offload"))])
@pytest.mark.parametrize("nested", [None, pytest.param(False, marks=pytest.mark.slow), True], ids=["dense", "nf4", "nested"])
def test_without_rounding_it_is_the_exact_pass(unrounded, mode, nested):
    expected, theirs = gradients(nested=nested)
    loss, ours = gradients("fp8", mode=mode, nested=nested)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(ours, theirs) <= BAR


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("lora", ADAPTED, ids=["all", "qv", "rank_70", "one_layer"])
def test_adapters_anywhere_and_weights_kept(unrounded, monkeypatch, lora, keeps):
    monkeypatch.setattr(WrittenProgram, "_keeps_weights", keeps)
    changes = {"attention_bias": True, "mlp_bias": True}
    expected, theirs = gradients(mode="selective", changes=changes, nested=True, lora=lora)
    loss, ours = gradients("fp8", mode="selective", changes=changes, nested=True, lora=lora)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(ours, theirs) <= BAR


def test_the_mlp_in_tiles(unrounded, monkeypatch):
    expected, theirs = gradients(nested=True)
    monkeypatch.setattr(mlp, "MLP_TILE", 256 * 13)
    loss, ours = gradients("fp8", mode="full", nested=True)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(ours, theirs) <= BAR


def test_adapters_that_move_are_seen(unrounded):
    """Losses of three steps whose adapters grow until the margins need their factors."""
    losses = {}
    for compute in ("exact", "fp8"):
        options = BuildOptions(implementations=FUSED, compute=compute)
        model, *_ = build("torch", nested=True, options=options, stir=False)
        step, step_batches = model.step(CausalLoss(), OptimizerOptions()), stream(examples(4, VOCAB))
        losses[compute] = [step(step_batches.batch(0), learning_rate=0.3, step=place, seed=0).floats()[0] for place in range(3)]
    assert np.ptp(losses["exact"]) > 0.3
    assert np.allclose(losses["fp8"], losses["exact"], rtol=1e-4)


@pytest.mark.parametrize("nested", [None, True], ids=["dense", "nested"])
def test_rounding_is_noise(nested):
    """A product's operands are each rounded by 2.6 % of a value on average. Through this random model's four blocks that
    becomes a quarter of a gradient (bfloat16's 0.1 % becomes 3 %), in no direction: they point where the exact ones do."""
    expected, theirs = gradients(nested=nested)
    loss, ours = gradients("fp8", "bfloat16", nested=nested)
    assert loss == pytest.approx(expected, rel=2e-2)
    flat, reference = (np.concatenate([found[name].ravel() for name in theirs]).astype(np.float64) for found in (ours, theirs))
    assert np.linalg.norm(flat - reference) <= 0.35 * np.linalg.norm(reference)
    assert (flat @ reference) / (reference @ reference) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({"dtype": "float32", "implementations": FUSED}, {}, "needs dtype bfloat16; got float32"),
        ({"implementations": {"train_pass": "composed"}}, {}, "'autograd' was asked for"),
        ({}, {}, "needs an NVIDIA GPU"),
        ({"implementations": FUSED}, {"changes": {"intermediate_size": 72}}, "multiples of 16"),
        ({"implementations": FUSED}, {"changes": {"intermediate_size": 96}, "nested": True}, "whole blocks of 64"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusals of a machine without a GPU")
def test_refusals(options, changes, reason):
    with pytest.raises(RefusedError, match=reason):
        model, *_ = build("torch", options=BuildOptions(**({"dtype": "bfloat16"} | options), compute="fp8"), **changes)
        model.step(CausalLoss(), OptimizerOptions())


def test_jax_refuses():
    with pytest.raises(RefusedError, match="runs on the torch backend so far"):
        build("jax", options=BuildOptions(compute="fp8"))
