"""The fast training passes of both backends on an NVIDIA GPU, judged by the composed ones in float32."""

from __future__ import annotations

import numpy as np
import pytest

from jaxsloth.backend import BuildOptions, OptimizerOptions
from jaxsloth.batch import Batch
from jaxsloth.models.memory import FILLED, activation_bytes
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.torch_backend import written_program
from tests.support.decoding import VARIANTS
from tests.support.small_models import VOCAB, build
from tests.support.sources import examples, first_batch, stream

pytestmark = pytest.mark.gpu
# Heads of 64 channels for cuDNN, and widths that the kernels' tiles do not divide.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 448,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}
MODES = ("none", "selective", "offload", "full", "auto")
FLOAT32_BAR, BFLOAT16_BAR = 3e-5, 8e-2  # bfloat16: each of two correct passes is up to 4e-2 from float32


def gradients(backend, batch: Batch, dtype: str, mode: str, train_pass: str, nested=True, lora=None) -> tuple[float, dict]:
    options = BuildOptions(dtype=dtype, gradient_checkpointing=mode, implementations={"train_pass": train_pass})
    return build(backend, WIDE, lora=lora, nested=nested, options=options)[0].gradients(batch)


@pytest.fixture(scope="module", params=[False, True], ids=["padded", "packed"])
def batch(request) -> Batch:
    return first_batch(stream(examples(8, VOCAB), packing=request.param))


@pytest.fixture(scope="module")
def judged(batch) -> tuple[float, dict]:
    return gradients("torch", batch, "float32", "none", "composed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "bar"), [("float32", FLOAT32_BAR), ("bfloat16", BFLOAT16_BAR)])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_gradients(backend, dtype, bar, mode, batch, judged):
    expected, theirs = judged
    loss, ours = gradients(backend, batch, dtype, mode, "fused")
    assert loss == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 5e-3)
    assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= bar


@pytest.mark.parametrize("mode", ["none", "selective", "offload", "full"])
@pytest.mark.parametrize("variant", ["qk_norm", "sandwich", "unnormed", "no_rope"])
def test_kinds_of_blocks_on_torch(variant, mode, batch):
    found = {}
    for train_pass in ("composed", "fused"):
        options = BuildOptions(gradient_checkpointing=mode, implementations={"train_pass": train_pass})
        model, *_ = build("torch", WIDE, nested=True, options=options, revise=VARIANTS[variant])
        found[train_pass] = model.gradients(batch)
    (expected, theirs), (loss, ours) = found["composed"], found["fused"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= FLOAT32_BAR


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_dense_bases(backend, batch):
    expected, theirs = gradients("torch", batch, "float32", "none", "composed", nested=None)
    loss, ours = gradients(backend, batch, "float32", "selective", "fused", nested=None)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= FLOAT32_BAR


@pytest.mark.parametrize(("dtype", "bar"), [("float32", FLOAT32_BAR), ("bfloat16", BFLOAT16_BAR)])
@pytest.mark.parametrize("lora", [{"r": 32}, {"r": 64}, {"r": 256}, {"r": 64, "targets": ["q_proj", "v_proj"]}])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_ranks(backend, lora, dtype, bar, batch):
    """Rooms of 0 to 768 columns."""
    lora = lora | {"alpha": float(lora["r"])}
    expected, theirs = gradients("torch", batch, "float32", "none", "composed", lora=lora)
    loss, ours = gradients(backend, batch, dtype, "offload", "fused", lora=lora)
    assert loss == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 5e-3)
    assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= bar


@pytest.mark.parametrize(
    ("mode", "changes", "lora"),
    [
        ("none", {}, {}),
        ("offload", {}, {}),
        ("full", {}, {"dropout": 0.2}),
        ("offload", {}, {"dropout": 0.2, "targets": ["q_proj", "v_proj"]}),
        ("selective", {"attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
        ("none", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_graphs_replay_what_they_recorded(mode, changes, lora):
    """Three batches of one shape and one of another, twice round: eager first, then recorded, then replayed."""
    losses = {}
    for train_pass in ("fused", "composed"):
        options = BuildOptions(dtype="float32", gradient_checkpointing=mode, implementations={"train_pass": train_pass})
        model, *_ = build("torch", WIDE | changes, lora=lora, nested=True, options=options)
        step = model.step(CausalLoss(), OptimizerOptions(weight_decay=0.1))
        step_batches = [stream(examples(16, VOCAB), batch_size=size).batch(place) for size in (4, 4, 2) for place in (0, 1)]
        losses[train_pass] = [
            step(step_batch, learning_rate=1e-2, step=place, seed=0).floats()[0]
            for place, step_batch in enumerate(step_batches * 2)
        ]
        if train_pass == "fused":
            assert model.written_program().captured >= 2
    assert np.allclose(losses["fused"], losses["composed"], rtol=0, atol=2e-4)


def test_auto_chooses_again_beside_what_was_recorded(monkeypatch):
    """Graphs of short batches, longer ones that are offloaded, recorded too, and the short ones' graphs again."""
    monkeypatch.setattr(written_program, "KEPT_WEIGHTS", 0)  # no copies of weights, which would take of the free memory below
    step_batches = [stream(examples(16, VOCAB), batch_size=size).batch(0) for size in (1, 1, 1, 4, 4, 4, 1, 4)]
    losses = {}
    for train_pass in ("fused", "composed"):
        options = BuildOptions(dtype="float32", gradient_checkpointing="auto", implementations={"train_pass": train_pass})
        model, *_ = build("torch", WIDE, nested=True, options=options)
        longest = step_batches[3].input_ids.size
        free = activation_bytes(model.spec, "offload", longest, 4) / FILLED + 1
        monkeypatch.setattr(written_program, "free_memory", lambda device, free=free: free)
        step, modes = model.step(CausalLoss(), OptimizerOptions()), []
        losses[train_pass] = []
        for place, step_batch in enumerate(step_batches):
            losses[train_pass].append(step(step_batch, learning_rate=1e-2, step=place, seed=0).floats()[0])
            if train_pass == "fused":
                modes.append(model.written_program().mode)
        if train_pass == "fused":
            assert modes == ["none"] * 3 + ["offload"] * 5
            assert model.written_program().captured == 2
    assert np.allclose(losses["fused"], losses["composed"], rtol=0, atol=2e-4)


def test_evaluation_between_replays():
    model, *_ = build("torch", WIDE, nested=True, options=BuildOptions(dtype="bfloat16"))
    step, evaluate = model.step(CausalLoss(), OptimizerOptions()), model.eval_step()
    step_batches = stream(examples(8, VOCAB))
    held_out = first_batch(step_batches)
    before = float(evaluate(held_out)[0])
    for place in range(6):
        step(step_batches.batch(0), learning_rate=1e-2, step=place, seed=0)
    after = float(evaluate(held_out)[0])
    assert np.isfinite(after) and after < before
