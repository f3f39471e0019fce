"""Training on pairs of answers, on both backends, against TRL's own DPOTrainer over transformers and PEFT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxsloth.backend import BuildOptions, OptimizerOptions, PreferenceOptions, load_backend
from jaxsloth.batch import Batch, Window
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.parity.measure import max_abs, relative_frobenius
from jaxsloth.transforms import add_lora
from tests.support.preference_judge import ALPHA, RANK, Judge, window_of
from tests.support.sources import DictSource, examples, stream
from tests.support.tiny import CONFIG, random_weights

BACKENDS = ("torch", "jax")
both = pytest.mark.parametrize("backend", BACKENDS)
LOSSES = {
    "sigmoid": PreferenceOptions(beta=0.3),
    "conservative": PreferenceOptions(beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceOptions(loss="ipo", beta=0.5),
    "hinge": PreferenceOptions(loss="hinge", beta=0.1),
}
# No clipping, so that the first moment after one step is the gradient.
PLAIN = OptimizerOptions(max_grad_norm=None)
BAR = 1e-5
# A log-prob of -160 is rounded by 1e-5, and so are a pair's weights where they come near 0 (conservative DPO).
GRADIENT_BAR = 2e-5
WEIGHTS = random_weights(CONFIG, 1)


def spec_of(**lora):
    return add_lora(spec_from_config(CONFIG), r=RANK, alpha=ALPHA, **lora)


def values_of(spec) -> dict[str, np.ndarray]:
    """Adapters that change much; what is trained whole begins near its base."""
    generator = np.random.Generator(np.random.Philox(5))
    return {
        name: generator.normal(0, 0.15, shape).astype(np.float32)
        if "lora_" in name
        else WEIGHTS[name.removeprefix("base_model.model.")] + generator.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in trainable_shapes(spec).items()
    }


def build(backend, implementations=None, options=None, **lora):
    spec = spec_of(**lora)
    options = options or BuildOptions(implementations=implementations)
    model = load_backend(backend).build(replace(spec, lora=None), DictSource(WEIGHTS), options)
    model.add_adapters(spec, values_of(spec))
    return model


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    return Judge(tmp_path_factory.mktemp("trl"), WEIGHTS, values_of(spec_of()))


@pytest.fixture(scope="module")
def reference(judge) -> np.ndarray:
    return judge.log_probs(adapters=False).astype(np.float32)


def first_step(model, preference: PreferenceOptions, window: Window, reference: np.ndarray):
    """(loss, log-probs ``[rows]``, gradients by PEFT name) of one step."""
    step = model.preference_step(PLAIN, preference)
    result = step(window, reference.reshape(window.rows.shape), learning_rate=1e-3, step=0, seed=0)
    moments, suffix = step.state(), ".exp_avg"
    rise = 1.0 - PLAIN.betas[0]
    gradients = {name.removesuffix(suffix): value / rise for name, value in moments.items() if name.endswith(suffix)}
    return result.floats()[0], result.host_log_probs().reshape(-1), gradients


def batch_of(window: Window, micro: int = 0) -> Batch:
    return Batch(
        *(array[micro] for array in (window.input_ids, window.targets, window.segments, window.positions, window.rows))
    )


def check(
    model, judge: Judge, preference: PreferenceOptions, window: Window, reference: np.ndarray, bar: float = GRADIENT_BAR
) -> None:
    verdict = judge.judge(preference)
    loss, _, gradients = first_step(model, preference, window, reference)
    assert loss == pytest.approx(verdict.loss, abs=BAR)
    assert gradients.keys() == verdict.gradients.keys()
    worst = {name: relative_frobenius(gradients[name], gradient) for name, gradient in verdict.gradients.items()}
    assert max(worst.values()) <= bar, max(worst, key=lambda name: worst[name])


@both
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_trls(backend, name, judge, reference):
    check(build(backend), judge, LOSSES[name], window_of(judge.examples, 2), reference)
