"""The fused pass with its frozen products in 8 bits: exact where nothing is rounded, and near it where e4m3 rounds."""

from __future__ import annotations

import pytest
import torch

from jaxsloth.backend import BuildOptions
from jaxsloth.kernels.fp8 import torch_ops
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.torch_backend import fp8, fused
from jaxsloth.torch_backend.passes import FastPass
from tests.models.test_backends import VOCAB, build
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


@pytest.mark.parametrize("mode", ["none", "selective", "offload", "full"])
@pytest.mark.parametrize("nested", [None, False, True], ids=["dense", "nf4", "nested"])
def test_without_rounding_it_is_the_exact_pass(unrounded, mode, nested):
    expected, theirs = gradients(nested=nested)
    loss, ours = gradients("fp8", mode=mode, nested=nested)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(ours, theirs) <= BAR


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("lora", ADAPTED, ids=["all", "qv", "rank_70", "one_layer"])
def test_adapters_anywhere_and_weights_kept(unrounded, monkeypatch, lora, keeps):
    monkeypatch.setattr(FastPass, "_choose", lambda self, tokens: ("selective", keeps))
    changes = {"attention_bias": True, "mlp_bias": True}
    expected, theirs = gradients(changes=changes, nested=True, lora=lora)
    loss, ours = gradients("fp8", changes=changes, nested=True, lora=lora)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(ours, theirs) <= BAR


def test_the_mlp_in_tiles(unrounded, monkeypatch):
    expected, theirs = gradients(nested=True)
    monkeypatch.setattr(fused, "MLP_TILE", 256 * 13)
    loss, ours = gradients("fp8", mode="full", nested=True)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(ours, theirs) <= BAR
