"""The written-out training pass of the torch backend gives autograd's loss and gradients, whatever it keeps or recomputes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxsloth.backend import BuildOptions
from jaxsloth.batch import Batch
from jaxsloth.kernels.registry import RefusedError
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.torch_backend import layer_pass
from jaxsloth.torch_backend.optimizer import total_norm
from tests.models.test_backends import LLAMA3, VOCAB, build
from tests.support.sources import examples, first_batch, stream

FUSED = {"train_pass": "fused"}
BAR = 3e-5  # sums of another order; a wrong term is worth 1e-2 and more


def compare(batch: Batch, mode: str = "none", changes=None, **how) -> float:
    """The largest difference of a gradient from autograd's; the loss is asserted here."""
    judge, *_ = build("torch", changes, **how)
    model, *_ = build("torch", changes, options=BuildOptions(gradient_checkpointing=mode, implementations=FUSED), **how)
    (expected, theirs), (loss, ours) = judge.gradients(batch), model.gradients(batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert all(np.any(gradient) for gradient in theirs.values())
    return max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items())


@pytest.mark.parametrize("mode", ["none", "offload", "full"])
def test_every_mode(mode):
    assert compare(first_batch(stream(examples(4, VOCAB))), mode) <= BAR


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3},
        {"num_key_value_heads": 1},
        {"hidden_act": "gelu_pytorch_tanh"},
    ],
)
def test_every_variant(changes):
    assert compare(first_batch(stream(examples(4, VOCAB))), "selective", changes) <= BAR


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_quantized_bases(nested, mode):
    assert compare(first_batch(stream(examples(4, VOCAB))), mode, nested=nested) <= BAR


@pytest.mark.parametrize(
    "lora",
    [{"targets": ["q_proj", "v_proj"]}, {"targets": ["up_proj"], "r": 70}, {"targets": ["model.layers.2.mlp.down_proj"]}],
)
def test_some_layers_without_adapters(lora):
    assert compare(first_batch(stream(examples(4, VOCAB))), "selective", lora=lora) <= BAR


def test_packed_documents():
    batch = first_batch(stream(examples(8, VOCAB), packing=True))
    assert batch.segments.max() > 1
    assert compare(batch, "selective") <= BAR


def test_the_mlp_in_tiles(monkeypatch):
    monkeypatch.setattr(layer_pass, "MLP_TILE", 256 * 13)
    assert compare(first_batch(stream(examples(4, VOCAB))), "full") <= BAR


def test_refusals():
    with pytest.raises(RefusedError, match="dropout"):
        build("torch", lora={"dropout": 0.1}, options=BuildOptions(implementations=FUSED))[0].gradients(
            first_batch(stream(examples(4, VOCAB)))
        )


def test_the_norm_of_many_gradients():
    gradient = np.full(20_000_003, 1e-3, np.float32)
    assert float(total_norm(torch.from_numpy(gradient))) == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_op_that_is_not_there_is_refused(backend):
    with pytest.raises(RefusedError, match="did you mean 'train_pass'"):
        build(backend, options=BuildOptions(implementations={"train_pas": "fused"}))
