"""Training on pairs of answers, on both backends, against TRL's own DPOTrainer over transformers and PEFT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxsloth.backend import BuildOptions, OptimizerOptions, load_backend
from jaxsloth.batch import StepBatch
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.objectives.preference import REFERENCE, PreferenceLoss
from jaxsloth.parity.measure import max_abs, relative_frobenius
from jaxsloth.transforms import add_lora
from tests.support.preference_judge import ALPHA, RANK, SMALL, Judge, step_batch_of
from tests.support.sources import DictSource
from tests.support.tiny import random_weights

BACKENDS = ("torch", "jax")
both = pytest.mark.parametrize("backend", BACKENDS)
LOSSES = {
    "sigmoid": PreferenceLoss(beta=0.3),
    "conservative": PreferenceLoss(beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceLoss(loss="ipo", beta=0.5),
    "hinge": PreferenceLoss(loss="hinge", beta=0.1),
}
# No clipping, so that the first moment after one step is the gradient; a loss scale must cancel.
PLAIN = OptimizerOptions(max_grad_norm=None)
SCALED = replace(PLAIN, loss_scaling=True)
BAR = 1e-5
# A log-prob of -160 is rounded by 1e-5, and so are a pair's weights where they come near 0 (conservative DPO).
GRADIENT_BAR = 2e-5
FUSED = {"train_pass": "fused"}
HEAD = {"modules_to_save": ["lm_head"]}
WEIGHTS = random_weights(SMALL, 1)


def build(backend, *, mode="none", implementations=None, weights=WEIGHTS, **lora):
    """A model with adapters that change much; what is trained whole begins near its base."""
    options = BuildOptions(gradient_checkpointing=mode, implementations=implementations)
    model = load_backend(backend).build(spec_from_config(SMALL), DictSource(weights), options)
    spec = add_lora(model.spec, r=RANK, alpha=ALPHA, **lora)
    model.add_adapters(spec, values_of(spec))
    return model


def values_of(spec) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(5))
    found = {}
    for name, shape in trainable_shapes(spec).items():
        base = 0.0 if "lora_" in name else WEIGHTS[name.removeprefix("base_model.model.")]
        found[name] = (base + generator.normal(0, 0.15 if "lora_" in name else 0.02, shape)).astype(np.float32)
    return found


def make_judge(folder, **lora) -> Judge:
    return Judge(folder, WEIGHTS, values_of(add_lora(spec_from_config(SMALL), r=RANK, alpha=ALPHA, **lora)), **lora)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    return make_judge(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def reference(judge) -> np.ndarray:
    return judge.log_probs(adapters=False).astype(np.float32)


def compared(step_batch: StepBatch, reference: np.ndarray) -> StepBatch:
    """The step batch beside its reference's log-probs ``[rows]``."""
    return replace(step_batch, values={REFERENCE: reference.reshape(step_batch.rows.shape)})


def first_step(model, preference: PreferenceLoss, step_batch: StepBatch, reference: np.ndarray, options=PLAIN):
    """(loss, log-probs ``[rows]``, gradients by PEFT name) of one step."""
    step = model.step(preference, options)
    result = step(compared(step_batch, reference), learning_rate=1e-3, step=0, seed=0)
    suffix, rise = ".exp_avg", 1.0 - options.betas[0]
    gradients = {name.removesuffix(suffix): value / rise for name, value in step.state().items() if name.endswith(suffix)}
    return result.floats()[0], result.host_log_probs().reshape(-1), gradients


def check(model, judge: Judge, preference: PreferenceLoss, step_batch: StepBatch, reference: np.ndarray, options=PLAIN) -> None:
    verdict = judge.judge(preference)
    loss, _, gradients = first_step(model, preference, step_batch, reference, options)
    assert loss == pytest.approx(verdict.loss, abs=BAR)
    assert gradients.keys() == verdict.gradients.keys()
    worst = {name: relative_frobenius(gradients[name], gradient) for name, gradient in verdict.gradients.items()}
    assert max(worst.values()) <= GRADIENT_BAR, max(worst.items(), key=lambda item: item[1])


@both
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_trls(backend, name, judge, reference):
    check(build(backend), judge, LOSSES[name], step_batch_of(judge.examples, 2), reference)


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("torch", "none"), ("torch", "full"), *(pytest.param("jax", mode, marks=pytest.mark.slow) for mode in ("none", "full"))],
)
def test_the_fused_passes_are_trls(backend, mode, judge, reference):
    model = build(backend, mode=mode, implementations=FUSED)
    check(model, judge, LOSSES["ipo"], step_batch_of(judge.examples, 2), reference)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "implementations"), [("torch", None), ("torch", FUSED), ("jax", None)])
def test_pairs_of_nothing_and_layouts_change_nothing(backend, implementations, judge, reference):
    """One micro-batch; and three of which the last holds nothing, its reference not a number."""
    nothing = np.full(4, np.nan, np.float32)
    for step_batch, padded in (
        (step_batch_of(judge.examples, 1), reference),
        (step_batch_of(judge.examples, 3, filling=2), np.concatenate([reference, nothing])),
    ):
        check(build(backend, implementations=implementations), judge, LOSSES["sigmoid"], step_batch, padded, SCALED)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "implementations"), [("torch", None), ("torch", FUSED), ("jax", None)])
def test_log_probs_of_rows(backend, implementations, judge, reference):
    model, step_batch = build(backend, implementations=implementations), step_batch_of(judge.examples, 1)
    batch, before, expected = step_batch.micro(0), model.trainable(), judge.log_probs(adapters=True)
    on, off = model.row_log_probs(), model.row_log_probs(adapters=False)
    for _ in range(2):
        np.testing.assert_allclose(on(batch), expected, rtol=1e-6)
        np.testing.assert_allclose(off(batch), reference, rtol=1e-6)
    assert max_abs(expected, reference) > 1
    assert all(np.array_equal(before[name], value) for name, value in model.trainable().items())
    _, found, _ = first_step(model, LOSSES["sigmoid"], step_batch, reference)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert max_abs(on(batch), expected) > 1e-3  # the step's own: after it they are others
    bare = load_backend(backend).build(spec_from_config(SMALL), DictSource(WEIGHTS), BuildOptions())
    np.testing.assert_allclose(bare.row_log_probs()(batch), reference, rtol=1e-6)


def test_steps_that_are_asked_for_again_share_a_program_on_jax(judge, monkeypatch):
    """Trainers ask at every evaluation, and DPO at every step of its first epoch."""
    from jaxsloth.jax_backend import step

    traced, row_losses = [], step.row_losses
    monkeypatch.setattr(step, "row_losses", lambda *given: traced.append(given) or row_losses(*given))
    model, batch = build("jax"), step_batch_of(judge.examples, 1).micro(0)
    for _ in range(2):
        model.row_log_probs()(batch)
        model.row_log_probs(adapters=False)(batch)
        model.eval_step()(batch)
    assert len(traced) == model.compilations() == 1
    model.eval_step(0.1)(batch)
    assert len(traced) == 2
    before, spec = model.row_log_probs()(batch), add_lora(replace(model.spec, lora=None), r=RANK, alpha=2 * ALPHA)
    model.add_adapters(spec, values_of(spec))
    assert max_abs(model.row_log_probs()(batch), before) > 1e-3  # the scale is compiled in


@pytest.mark.slow
def test_a_trained_head_is_trls(tmp_path, judge, reference):
    trained = make_judge(tmp_path, **HEAD)
    for backend, implementations in (("torch", None), ("torch", FUSED), ("jax", None)):
        model = build(backend, implementations=implementations, **HEAD)
        with pytest.raises(ValueError, match=r"lm_head\.weight is trained itself"):
            model.row_log_probs(adapters=False)
        check(model, trained, LOSSES["ipo"], step_batch_of(judge.examples, 2), reference)


@pytest.mark.slow
def test_dropout_is_drawn_and_the_same_on_both_backends(judge, reference):
    step_batch, losses = step_batch_of(judge.examples, 1), {}
    for backend, rate in (("torch", 0.0), ("torch", 0.3), ("jax", 0.3)):
        losses[backend, rate], *_ = first_step(build(backend, dropout=rate), LOSSES["sigmoid"], step_batch, reference)
    assert losses["torch", 0.3] == pytest.approx(losses["jax", 0.3], abs=BAR)
    assert abs(losses["torch", 0.3] - losses["torch", 0.0]) > 1e-3


@both
def test_wrong_windows(backend, judge, reference):
    step = build(backend).step(PreferenceLoss(), PLAIN)
    step_batch = step_batch_of(judge.examples, 2)
    odd = step_batch_of(judge.examples[:3], 2)
    for wrong, message in (
        (compared(replace(step_batch, segments=step_batch.segments * 2), reference), "got a packed step batch"),
        (compared(odd, reference[:6]), "multiple of 2 rows on 1 device.*got 3"),
        (replace(step_batch, values={REFERENCE: reference}), r"for every row, \(2, 4\), got those of \(8,\)"),
        (step_batch, "got none"),
    ):
        with pytest.raises(ValueError, match=message):
            step(wrong, learning_rate=1e-3, step=0, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "robust"}, "sigmoid, ipo, hinge, got 'robust'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "set it to 0 for ipo"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "full"])
@both
def test_steps_on_a_gpu(backend, mode):
    """The fast passes, on torch replayed from graphs, against the composed ones; cross-entropy steps come between."""
    wide = {"hidden_size": 256, "intermediate_size": 448, "head_dim": 64}
    pairs = [
        {"prompt_ids": [3, 4, 5], "chosen_ids": [9] * (6 + place), "rejected_ids": [7, 8] * (3 + place)} for place in range(8)
    ]
    step_batch, curves = step_batch_of(pairs, 2), {}
    for train_pass in ("fused", "composed"):
        options = BuildOptions(gradient_checkpointing=mode, implementations={"train_pass": train_pass})
        config = SMALL | wide
        model = load_backend(backend).build(spec_from_config(config), DictSource(random_weights(config, 1)), options)
        spec = add_lora(model.spec, r=RANK, alpha=ALPHA)
        model.add_adapters(spec, values_of(spec))
        off = model.row_log_probs(adapters=False)
        reference = np.stack([off(step_batch.micro(micro)) for micro in range(2)])
        step, other = model.step(PreferenceLoss(), PLAIN), model.step(CausalLoss(), PLAIN)
        curves[train_pass] = []
        for place in range(5):
            result = step(compared(step_batch, reference), learning_rate=1e-3, step=place, seed=0)
            loss = other(step_batch, learning_rate=1e-3, step=place, seed=0).floats()[0]
            curves[train_pass] += [result.floats()[0], loss, *result.host_log_probs().reshape(-1)]
    np.testing.assert_allclose(curves["fused"], curves["composed"], rtol=2e-4)
