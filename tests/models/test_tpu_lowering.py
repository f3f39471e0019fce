"""The programs of a train step and of a generation lower for a TPU. None has been seen: this is all that is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxsloth.backend import OptimizerOptions
from jaxsloth.generation import GenerationSettings, generate
from jaxsloth.jax_backend import decode_pass
from jaxsloth.jax_backend import generate as decoding
from jaxsloth.kernels import jax_platform
from jaxsloth.objectives.causal_lm import CausalLoss
from tests.support.lowering import lowered_for
from tests.support.small_models import VOCAB, build
from tests.support.sources import examples, stream

PROMPTS = [[1, 5, 9], [1, 3, 4, 7, 2]]


class Lowered:
    """A jitted function that is lowered for a TPU at each call, and run here."""

    def __init__(self, function, texts):
        self._function, self._texts = function, texts

    def __call__(self, *arguments, **settings):
        self._texts.append(lowered_for("tpu", self._function, *arguments, **settings))
        return self._function(*arguments, **settings)


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Implementations are chosen as on a TPU."""
    original = jax_platform.platform
    for module in [module for name, module in sys.modules.items() if name.startswith("jaxsloth.")]:
        if getattr(module, "platform", None) is original:
            monkeypatch.setattr(module, "platform", lambda: "tpu")


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.1, "targets": ["v_proj"]}], ids=["nf4", "dropout"])
def test_training(as_on_a_tpu, lora):
    texts: list[str] = []
    built, *_ = build("jax", nested=True, lora=lora)
    train = built.step(CausalLoss(), OptimizerOptions())
    train._run = Lowered(train._run, texts)
    assert np.isfinite(train(stream(examples(8, VOCAB)).batch(0), learning_rate=1e-3, step=0, seed=0).floats()[0])
    assert len(texts) == 1 and "stablehlo.dot_general" in texts[0] and "custom_call" not in texts[0]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 5, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_generation(as_on_a_tpu, monkeypatch, sampling):
    texts: list[str] = []
    built, *_ = build("jax", nested=True)
    for module, name in ((decoding, "_forward"), (decoding, "_say"), (decoding, "first"), (decode_pass, "say")):
        monkeypatch.setattr(module, name, Lowered(getattr(module, name), texts))
    answers = generate(built, PROMPTS, GenerationSettings(max_new_tokens=4, eos_ids=(), **sampling))
    assert [len(answer) for answer in answers] == [4, 4] and len(texts) >= 3
    assert not any("tpu_custom_call" in text for text in texts)
