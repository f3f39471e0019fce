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
from jaxsloth.kernels.registry import Implementation, Op, RefusedError, Target
from jaxsloth.kernels.rms_norm import torch_ops as norm_ops
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from jaxsloth.models.memory import FILLED, activation_bytes, offloaded_bytes
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.torch_backend import mlp, ops, written_program
from jaxsloth.torch_backend.attention import Attention
from jaxsloth.torch_backend.block import kept_widths
from jaxsloth.torch_backend.mlp import Mlp
from jaxsloth.torch_backend.offload import Offloaded
from jaxsloth.torch_backend.ops import Kernels, Ops
from jaxsloth.torch_backend.optimizer import total_norm
from jaxsloth.torch_backend.written_pass import WrittenPass, activation_widths, describe, make_pairs
from tests.support.decoding import VARIANTS
from tests.support.small_models import LLAMA3, VOCAB, build, losses_of
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
    monkeypatch.setattr(mlp, "MLP_TILE", 256 * 13)
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
    chosen, automatic = (Kernels.of(Ops(Target("cuda"), requested)) for requested in ({op: "torch"}, {}))
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
    monkeypatch.setattr(ops, "RMS_NORM", Op("rms_norm", (*RMS_NORM.implementations, own)))
    model, *_ = build("torch", options=BuildOptions(implementations=FUSED | {"rms_norm": "counted"}))
    model.gradients(first_batch(stream(examples(4, VOCAB))))
    norms = 2 * len(model.spec.layers) + 1
    assert calls == {"add_norm": norms, "add_norm_backward": norms - 1}


def test_auto_chooses_again_for_longer_batches(monkeypatch):
    """What fits 64 tokens and no more; an evaluation, which keeps nothing, has no say."""
    options = BuildOptions(gradient_checkpointing="auto", implementations=FUSED)
    judge, model = build("torch")[0], build("torch", options=options)[0]
    need = activation_bytes(model.spec, "none", 64, 4)
    monkeypatch.setattr(written_program, "free_memory", lambda device: need / FILLED + 1)
    longer, shorter = (first_batch(stream(examples(rows, VOCAB), batch_size=rows)) for rows in (4, 1))
    assert longer.input_ids.size > 64 >= shorter.input_ids.size
    program, modes = model.written_program(), []
    model.eval_step()(longer)
    for batch in (shorter, longer, shorter):
        (expected, theirs), (loss, ours) = judge.gradients(batch), model.gradients(batch)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= BAR
        modes.append((program.mode, program._pass._mode))
    assert modes == [("none", "none"), ("full", "full"), ("full", "full")]
    assert model.written_program() is program


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", ["qk_norm", "windows", "no_rope", "sandwich", "unnormed", "gemma_norm"])
def test_every_kind_of_block(variant, mode):
    assert compare(first_batch(stream(examples(4, VOCAB))), mode, revise=VARIANTS[variant]) <= BAR


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("body", [Attention, Mlp])
def test_a_body_that_refuses_its_pair_takes_its_local_vjp(body, mode, monkeypatch):
    monkeypatch.setattr(body, "written_refusal", lambda self: "is refused by this test")
    revise = VARIANTS["sandwich"]
    assert compare(first_batch(stream(examples(8, VOCAB), packing=True)), mode, nested=True, revise=revise) <= BAR


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize(
    "lora",
    [
        {"bias": "all"},
        {"bias": "lora_only", "targets": ["k_proj", "gate_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"], "targets": ["model.layers.3.mlp.down_proj"]},
    ],
)
def test_biases_and_whole_modules(lora, mode):
    changes = {"attention_bias": True, "mlp_bias": True}
    batch = first_batch(stream(examples(4, VOCAB)))
    assert compare(batch, mode, changes, lora=lora, revise=VARIANTS["sandwich"]) <= BAR


class HostCopies:
    """Stands for `ActivationOffload` where there is no GPU: the tensors go to copies, in the order that it asks for."""

    def __init__(self):
        self.sent, self.fetched = [], []

    def put(self, tensors):
        self.sent.append({part or name for _, name, part in tensors})
        return Offloaded({key: tensor.clone() for key, tensor in tensors.items()})

    def get(self, layers, index, first):
        self.fetched.append(index)
        return layers[index].host


@pytest.mark.parametrize(("mode", "names"), [("selective", {"total", "output", "qkv", "attended"}), ("full", {"total"})])
def test_offloaded_tensors_leave_and_come_back(mode, names, monkeypatch):
    copies, keep = HostCopies(), WrittenPass.keep

    def keep_on_host(self, *how):
        keep(self, *how)
        self._offload = copies

    monkeypatch.setattr(WrittenPass, "keep", keep_on_host)
    lora = {"targets": [f"model.layers.{index}.self_attn.q_proj" for index in (1, 2, 3)]}
    assert compare(first_batch(stream(examples(4, VOCAB))), mode, lora=lora, revise=VARIANTS["sandwich"]) <= BAR
    assert copies.sent == [names] * 3 and copies.fetched == [3, 2, 1]


@pytest.mark.parametrize("mode", ["none", "selective", "offload", "full"])
def test_the_estimate_of_memory_is_what_bodies_declare(mode):
    """On Llama's blocks it is the formula of jaxsloth.models.memory."""
    model, spec, *_ = build("torch")
    device, host = activation_widths(model.decoder, spec.lora, make_pairs(model.decoder), mode)
    assert device * 10 * 2 == activation_bytes(spec, mode, 10, 2)
    assert host * 10 * 2 == (offloaded_bytes(spec, 10, 2) if mode == "offload" else 0)


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("variant", ["dense", "qk_norm", "sandwich", "unnormed"])
def test_what_is_kept_is_what_bodies_declare(variant, mode):
    """Elements of every large tensor between the forward and the backward of a block without adapters."""
    options = BuildOptions(implementations=FUSED)
    model, *_ = build("torch", lora={"targets": ["q_proj"]}, options=options, revise=VARIANTS[variant])
    program, batch = model.written_program(), first_batch(stream(examples(4, VOCAB)))
    program.begin(batch.input_ids.size)
    program._pass.keep(mode)
    _, forward = program._pass.hidden(program._sent(batch, {}), learns=True)
    tokens, found = batch.input_ids.size, 0
    for kept in forward.layers[0]:
        tensors = [kept.total, kept.normed, kept.output, *(kept.body.get(name) for name in ("qkv", "attended", "gate_up"))]
        tensors += list(kept.body.get("turned", ()))
        own = {tensor.data_ptr(): tensor for tensor in tensors if tensor is not None}  # without a norm the input is the stream
        found += sum(tensor.numel() for tensor in own.values())
    pads = 64 if mode == "none" else 0  # behind the rows of the projections' input
    widths = kept_widths(model.decoder.blocks[0], program._pass.pairs, model.spec.hidden, mode)
    assert found == tokens * (widths[0] + pads)


def test_dropout_is_written():
    """The masks of the written pass are autograd's: losses and adapters of three steps with one window's rows in two passes."""
    trained = []
    for train_pass in ("fused", "composed"):
        options = BuildOptions(gradient_checkpointing="selective", implementations={"train_pass": train_pass})
        model, *_ = build("torch", lora={"dropout": 0.2, "targets": ["q_proj", "v_proj"]}, options=options)
        losses, _ = losses_of(model, stream(examples(8, VOCAB), accumulation=2), 3)
        trained.append((losses, np.concatenate([value.ravel() for value in model.trainable().values()])))
    assert describe(model.decoder) == ["4 blocks: self_attn: written; mlp: written"]
    assert np.ptp(trained[1][0]) > 1e-3
    np.testing.assert_allclose(trained[0][0], trained[1][0], rtol=1e-6)
    np.testing.assert_allclose(trained[0][1], trained[1][1], atol=1e-4)


def test_trained_biases_move_between_steps():
    trained = []
    for train_pass in ("fused", "composed"):
        options = BuildOptions(implementations={"train_pass": train_pass})
        model, *_ = build("torch", {"attention_bias": True}, lora={"bias": "all"}, options=options)
        trained.append(losses_of(model, stream(examples(4, VOCAB)), 4)[0])
    assert np.ptp(trained[1]) > 1e-2
    np.testing.assert_allclose(trained[0], trained[1], rtol=1e-5)


def test_the_norm_of_many_gradients():
    gradient = np.full(20_000_003, 1e-3, np.float32)
    assert float(total_norm(torch.from_numpy(gradient))) == pytest.approx(np.linalg.norm(gradient.astype(np.float64)), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_op_that_is_not_there_is_refused(backend):
    with pytest.raises(RefusedError, match="did you mean 'train_pass'"):
        build(backend, options=BuildOptions(implementations={"train_pas": "fused"}))
