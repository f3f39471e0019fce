"""The written-out training pass of the torch backend gives autograd's loss and gradients, whatever it keeps or recomputes."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType

import numpy as np
import pytest
import torch

from jaxsloth.backend import BuildOptions
from jaxsloth.batch import Batch
from jaxsloth.kernels.registry import Facts, Implementation, Op, RefusedError
from jaxsloth.kernels.rms_norm import torch_ops as norm_ops
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from jaxsloth.models.memory import FILLED, activation_bytes
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.torch_backend import layer_pass, layers, passes
from jaxsloth.torch_backend.layers import Ops
from jaxsloth.torch_backend.optimizer import total_norm
from tests.support.small_models import LLAMA3, VOCAB, build
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


@pytest.mark.parametrize(
    ("op", "part", "asked", "otherwise"),
    [
        ("rms_norm", "norm", "rms_norm.torch_ops", "rms_norm.triton_kernel"),
        ("rope", "rope", "rope.torch_ops", "rope.triton_kernel"),
        ("gated_activation", "activation", "gated_activation.torch_ops", "gated_activation.triton_kernel"),
        ("linear_cross_entropy", "loss", "linear_cross_entropy.torch_ops", "linear_cross_entropy.triton_kernel"),
        ("nf4_dequantize", "weights", "lora_matmul.extended", "lora_matmul.triton_kernel"),
    ],
)
def test_an_op_asked_for_by_name_decides_the_passs_own_module(op, part, asked, otherwise):
    """As on a GPU, where Triton is the first choice: what is not asked for keeps it."""
    chosen, automatic = (layer_pass.Kernels.of(Ops(Facts("cuda"), requested)) for requested in ({op: "torch"}, {}))
    assert getattr(chosen, part).__name__ == f"jaxsloth.kernels.{asked}"
    assert getattr(automatic, part).__name__ == f"jaxsloth.kernels.{otherwise}"
    assert {**vars(chosen), part: None} == {**vars(automatic), part: None}


def test_the_pass_runs_the_norm_that_the_registry_chose(monkeypatch):
    """A module that only the registry knows is called for every norm, both ways; nobody wants the first one's gradient."""
    counted, calls = ModuleType("counted_norm"), Counter()

    def counting(name):
        def run(*args, **settings):
            calls[name] += 1
            return getattr(norm_ops, name)(*args, **settings)

        return run

    for name in ("rms_norm", "add_norm", "add_norm_backward"):
        setattr(counted, name, counting(name))
    monkeypatch.setitem(sys.modules, "counted_norm", counted)
    own = Implementation("counted", "torch", "counted_norm:rms_norm")
    monkeypatch.setattr(layers, "RMS_NORM", Op("rms_norm", (*RMS_NORM.implementations, own)))
    model, *_ = build("torch", options=BuildOptions(implementations=FUSED | {"rms_norm": "counted"}))
    model.gradients(first_batch(stream(examples(4, VOCAB))))
    norms = 2 * len(model.spec.layers) + 1
    assert calls == {"add_norm": norms, "add_norm_backward": norms - 1}


def test_auto_chooses_again_for_longer_batches(monkeypatch):
    """What fits 64 tokens and no more; an evaluation, which keeps nothing, has no say."""
    options = BuildOptions(gradient_checkpointing="auto", implementations=FUSED)
    judge, model = build("torch")[0], build("torch", options=options)[0]
    need = activation_bytes(model.spec, "none", 64, 4)
    monkeypatch.setattr(passes, "free_memory", lambda device: need / FILLED + 1)
    longer, shorter = (first_batch(stream(examples(rows, VOCAB), batch_size=rows)) for rows in (4, 1))
    assert longer.input_ids.size > 64 >= shorter.input_ids.size
    fast, modes = model.fast_pass(), []
    model.eval_step()(longer)
    for batch in (shorter, longer, shorter):
        (expected, theirs), (loss, ours) = judge.gradients(batch), model.gradients(batch)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= BAR
        modes.append((fast.mode, fast._pass._mode))
    assert modes == [("none", "none"), ("full", "full"), ("full", "full")]
    assert model.fast_pass() is fast


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
