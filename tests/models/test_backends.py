"""Both backends on a small random Llama, by one body, judged by transformers, PEFT, bitsandbytes and torch's AdamW."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from jaxsloth.backend import BuildOptions, OptimizerOptions, load_backend
from jaxsloth.kernels.nf4.contract import NF4, Nested
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import Block
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity.l2_logits import pack
from jaxsloth.parity.measure import max_abs, relative_frobenius
from jaxsloth.parity.subjects import judge_logits, valid_rows
from jaxsloth.transforms import quantize
from tests.support.small_models import (
    BACKENDS,
    LLAMA3,
    VOCAB,
    build,
    check_gradients,
    judge_loss,
    later_losses,
    losses_of,
    peft_model,
    six_steps,
)
from tests.support.sources import DictSource, examples, first_batch, stream, transformers_model
from tests.support.tiny import CONFIG, random_weights

VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
both = pytest.mark.parametrize("backend", BACKENDS)


@both
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_transformers(backend, variant):
    model, _, weights, _ = build(backend, VARIANTS[variant], stir=False)
    batch = first_batch(stream(examples(4, VOCAB)))
    judge = transformers_model(CONFIG | VARIANTS[variant], weights)
    assert max_abs(valid_rows(model.logits(batch), batch), valid_rows(judge_logits(judge, batch), batch)) <= 1e-5


@both
def test_packed_rows_are_padded_rows(backend):
    model, *_ = build(backend)
    batch = first_batch(stream(examples(4, VOCAB)))
    packed = pack(batch)
    loss, gradients = model.gradients(batch)
    packed_loss, packed_gradients = model.gradients(packed)
    assert abs(loss - packed_loss) <= 1e-5
    assert max(relative_frobenius(packed_gradients[n], g) for n, g in gradients.items()) <= 1e-5


def bitsandbytes_quantized(weight: np.ndarray, nested: bool) -> tuple[NF4, np.ndarray]:
    """(bitsandbytes' NF4 of a weight as numpy arrays, what it dequantizes to)."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(torch.from_numpy(weight), compress_statistics=nested, quant_type="nf4")
    second = None
    if nested:
        second = Nested(state.state2.absmax.numpy(), state.offset.numpy(), state.state2.code.numpy())
    quantized = NF4(codes.numpy().reshape(-1), state.absmax.numpy(), second, weight.shape)
    return quantized, functional.dequantize_4bit(codes, state).numpy()


@both
@pytest.mark.parametrize("nested", [False, True], ids=["nf4", "nested"])
def test_a_bitsandbytes_base_is_taken_as_it_is(backend, nested):
    weights = random_weights(CONFIG, 1)
    spec = quantize(spec_from_config(CONFIG), nested=nested)
    stored, dense = dict(weights), dict(weights)
    for name in (f"{module}.weight" for module in spec.quantization.modules):
        stored[name], dense[name] = bitsandbytes_quantized(weights[name], nested)
    model = load_backend(backend).build(spec, DictSource(stored), BuildOptions())
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        assert np.array_equal(model.base_tensor(name), dense[name])
        assert np.array_equal(model.quantized_tensor(name).codes, stored[name].codes)
    batch = first_batch(stream(examples(4, VOCAB)))
    judge = judge_logits(transformers_model(CONFIG, dense), batch)
    assert max_abs(valid_rows(model.logits(batch), batch), valid_rows(judge, batch)) <= 1e-5


@both
def test_quantizing_while_loading_is_bitsandbytes(backend):
    model, spec, weights, _ = build(backend, nested=False)
    for module in spec.quantization.modules:
        _, dense = bitsandbytes_quantized(weights[f"{module}.weight"], False)
        assert np.array_equal(model.base_tensor(f"{module}.weight"), dense)


@both
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"targets": ["q_proj", "down_proj"], "rslora": True},
        {"targets": r"model\.layers\.[13]\..*proj"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "targets": ["v_proj"]},
    ],
    ids=["all", "rslora", "some_layers", "lm_head", "embed_tokens"],
)
def test_gradients_are_pefts(backend, lora):
    check_gradients(backend, {}, lora)


@both
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_pefts(backend, bias):
    check_gradients(backend, VARIANTS["biased"], {"targets": ["o_proj", "up_proj"], "bias": bias})


@both
def test_steps_are_torchs_adamw_on_peft(backend):
    model, spec, weights, values = build(backend)
    step_batches = stream(examples(20, VOCAB))
    ours, _ = losses_of(model, step_batches, 10)
    judge = peft_model(CONFIG, weights, spec, values)
    parameters = [p for p in judge.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(10):
        loss = judge_loss(judge, first_batch(step_batches, step))
        assert abs(loss.item() - ours[step]) <= 1e-5
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()


@both
def test_accumulation_layouts(backend):
    """With dropout; without it the trainers' accumulation is TRL's (tests/frontend/test_trainer.py)."""
    rows = examples(21, VOCAB)  # the third step, the last of the epoch, is short
    curves = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model, *_ = build(backend, lora={"dropout": 0.3, "targets": ["q_proj", "down_proj"]})
        curves.append(losses_of(model, stream(rows, batch_size=batch_size, accumulation=accumulation), 3)[0])
    assert max_abs(curves[1], curves[0]) <= 1e-5


def test_dropout_is_the_same_on_both_backends_and_does_something():
    step_batches = stream(examples(16, VOCAB))
    curves = {b: losses_of(build(b, lora={"dropout": 0.3})[0], step_batches, 4)[0] for b in BACKENDS}
    assert max_abs(curves["torch"], curves["jax"]) <= 1e-5
    assert max_abs(curves["torch"], losses_of(build("torch")[0], step_batches, 4)[0]) > 1e-3


@cache
def six_steps_of(backend):
    return six_steps(build(backend)[0], stream(examples(24, VOCAB)))


@pytest.mark.parametrize(("first", "second"), [("torch", "jax"), ("jax", "torch"), ("torch", "torch"), ("jax", "jax")])
def test_a_run_changes_backend(first, second):
    adapter, state, whole = six_steps_of(first)
    other, *_ = build(second, stir=False)
    other.load_trainable(adapter)
    rest = other.step(CausalLoss(), OptimizerOptions(weight_decay=0.1, max_grad_norm=0.3))
    rest.load_state(state)
    assert later_losses(rest, stream(examples(24, VOCAB))) == pytest.approx(whole, rel=0, abs=1e-5)


@both
def test_loss_scaling_skips_an_overflow(backend):
    model, *_ = build(backend, options=BuildOptions(dtype="float16"))
    step_batches = stream(examples(8, VOCAB))
    step_function = model.step(CausalLoss(), OptimizerOptions(loss_scaling=True))
    state = step_function.state()
    state["loss_scale"] = np.array(2.0**60, np.float32)
    step_function.load_state(state)
    before = model.trainable()
    loss, _, skipped = step_function(step_batches.batch(0), learning_rate=1e-2, step=0, seed=0).floats()
    after, now = model.trainable(), step_function.state()
    assert skipped and np.isfinite(loss)
    assert all(np.array_equal(before[n], after[n]) for n in before)
    assert float(now["loss_scale"]) == 2.0**59 and int(now["count"]) == 0
    state["loss_scale"] = np.array(2.0**10, np.float32)
    step_function.load_state(state)
    assert not step_function(step_batches.batch(0), learning_rate=1e-2, step=0, seed=0).floats()[2]
    assert any(not np.array_equal(before[n], v) for n, v in model.trainable().items())
    assert int(step_function.state()["good_steps"]) == 1


@both
def test_recomputing_changes_nothing(backend):
    batch = first_batch(stream(examples(4, VOCAB)))
    plain, *_ = build(backend)
    recomputed, *_ = build(backend, options=BuildOptions(gradient_checkpointing="full"))
    (loss, gradients), (again, same) = plain.gradients(batch), recomputed.gradients(batch)
    assert loss == pytest.approx(again, abs=1e-7)
    assert max(relative_frobenius(same[n], g) for n, g in gradients.items()) <= 1e-6


@both
def test_filler_rows_change_nothing(backend):
    rows = examples(3, VOCAB)
    losses = []
    for devices in (1, 4):
        model, *_ = build(backend)
        losses.append(losses_of(model, stream(rows, batch_size=3, devices=devices), 1)[0][0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@both
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "lacks the tensor model.layers.2.mlp.up_proj.weight"),
        (
            lambda w: w.update({"model.norm.weight": np.ones(63, np.float32)}),
            r"model.norm.weight must have the shape \(64,\), and it has \(63,\)",
        ),
        (
            lambda w: w["model.layers.1.self_attn.q_proj.weight"].__setitem__((0, 0), np.nan),
            "layers.1.self_attn.q_proj.weight.*NaN",
        ),
    ],
    ids=["missing", "shape", "nan"],
)
def test_damaged_weights_are_named(backend, damage, message):
    weights = random_weights(CONFIG, 1)
    damage(weights)
    with pytest.raises(ValueError, match=message):
        load_backend(backend).build(spec_from_config(CONFIG), DictSource(weights), BuildOptions())


@both
def test_an_unsupported_part_is_named(backend):
    spec = spec_from_config(CONFIG)
    layer = Block(tuple(replace(branch, position="post") for branch in spec.layers[0].branches))
    with pytest.raises(ValueError, match="norms behind the sum"):
        load_backend(backend).build(replace(spec, layers=(layer,) * 4), DictSource(random_weights(CONFIG, 1)), BuildOptions())


def test_compilations_are_those_of_xla():
    """A step object has a program of its own, though its shapes are another's."""
    model, *_ = build("jax", {"num_hidden_layers": 2})
    step_batch, counts = stream(examples(8, VOCAB)).batch(0), []
    for _ in range(2):
        step = model.step(CausalLoss(), OptimizerOptions())
        for place in range(2):
            step(step_batch, learning_rate=1e-3, step=place, seed=0)
            counts.append(model.compilations())
    assert counts == [1, 1, 2, 2]
