"""JAX's decoding programs: word for word what torch's layers say."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.generation import generate
from jaxsloth.jax_backend import attention, decode_pass, devices
from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.sampling import begin
from jaxsloth.kernels.registry import RefusedError, Target
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import Rope, RopeScaling
from jaxsloth.sampling import GREEDY, Sampling
from jaxsloth.transforms import quantize
from tests.support.decoding import PROMPTS, SETTINGS, VARIANTS, adapted, build, of_layers, padded
from tests.support.lowering import lowered_for_cuda
from tests.support.tiny import CONFIG

BIASED = CONFIG | {"attention_bias": True, "mlp_bias": True}
FAST = ("nested", "two_ropes", "sandwich")


def same_answers(*models):
    answers = []
    for model in models:
        model.add_adapters(*adapted(model))
        answers.append(generate(model, PROMPTS, SETTINGS))
    assert all(answer == answers[0] for answer in answers)
    assert len({tuple(row) for row in answers[0]}) == 3


@pytest.mark.parametrize("variant", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def test_it_says_what_the_layers_say(variant):
    spec = VARIANTS[variant](spec_from_config(BIASED))
    same_answers(build("jax", spec, "fused", nf4_matvec="xla"), build("torch", spec, "composed"))


def test_the_layers_say_it_with_the_matvec():
    spec = quantize(spec_from_config(BIASED), nested=True)
    same_answers(build("jax", spec, "composed", nf4_matvec="xla"), build("torch", spec, "composed"))


@pytest.mark.parametrize("name", ["fused", "composed"])
def test_steps_and_other_rows_may_follow_bursts(name):
    spec, found = VARIANTS["windows"](spec_from_config(CONFIG)), []
    for model in (build("jax", spec, name), build("torch", spec, "composed")):
        state = model.start_decode(*padded(), 30)
        bursts = list(state.choose(GREEDY, 11))
        assert sum(burst.shape[1] for burst in bursts) == 11
        state.reorder(np.array([2, 0, 0]))
        logits = state.step(bursts[-1][[2, 0, 0], -1])
        with pytest.raises(ValueError, match="11 more tokens do not fit"):
            state.choose(GREEDY, 12)
        more = list(state.choose(GREEDY, 11))  # the last burst goes on past the cache's end
        found.append((logits, np.concatenate(more, axis=1)))
    assert np.abs(found[0][0] - found[1][0]).max() < 1e-4
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", [pytest.param("fused", marks=pytest.mark.slow), "composed"])
def test_other_numbers_and_lengths_compile_nothing(name):
    model = build("jax", spec_from_config(CONFIG), name)
    sampled = replace(SETTINGS, do_sample=True, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)
    generate(model, PROMPTS, sampled)
    count = model.compilations()
    generate(model, [[*prompt[1:], 3, 5] for prompt in PROMPTS], replace(sampled, temperature=1.5, top_k=5, min_p=None, seed=4))
    generate(model, PROMPTS, replace(sampled, max_new_tokens=23, top_p=None))
    assert model.compilations() == count > 0
    generate(model, PROMPTS, replace(sampled, no_repeat_ngram_size=2))
    assert model.compilations() > count


def test_caches_too_large_to_lie_there_twice_stay_stacked(monkeypatch):
    spec = spec_from_config(CONFIG)
    monkeypatch.setattr(devices, "free_memory", lambda: 1000.0)
    model = build("jax", spec, None)
    with pytest.raises(RefusedError, match="no room for that"):
        generate(build("jax", spec, "fused"), PROMPTS, SETTINGS)
    monkeypatch.setattr("jaxsloth.jax_backend.state.platform", lambda: "cuda")
    assert model.decodes_fused(fits_twice=True) and not model.decodes_fused(fits_twice=False)


def test_what_it_refuses():
    spec = spec_from_config(CONFIG)
    stretched = of_layers(spec, lambda _: {"rope": Rope(10000.0, 16, RopeScaling("dynamic", 2.0))})
    with pytest.raises(RefusedError, match="dynamic scaling changes them with the length"):
        next(build("jax", stretched, "fused").start_decode(*padded(), 12).choose(GREEDY, 2))
    with pytest.raises(RefusedError, match="no implementation 'graph'"):
        next(build("jax", spec, "graph").start_decode(*padded(), 12).choose(GREEDY, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_say_what_the_layers_say(variant, rows):
    spec = VARIANTS[variant](spec_from_config(BIASED))
    prompts, answers = [PROMPTS[row % 3] for row in range(rows)], []
    for name in ("fused", "composed"):
        model = build("jax", spec, name)
        model.add_adapters(*adapted(model))
        answers.append(generate(model, prompts, replace(SETTINGS, max_new_tokens=40)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("rows", [1, 8])
def test_the_kernels_lower_for_cuda(monkeypatch, rows):
    model = build("jax", quantize(spec_from_config(BIASED), nested=True), "fused", dtype="bfloat16")
    model._ops = Ops(Target("cuda", "bfloat16"), {})
    model._assemble({})
    monkeypatch.setattr(attention, "platform", lambda: "cuda")
    caches = [Cache(*(jnp.zeros((rows, 64, 2, 16), jnp.bfloat16) for _ in range(2))) for _ in model.spec.layers]
    numbers = jnp.zeros(rows, jnp.int32)
    given = Sampling(do_sample=True, top_k=20, top_p=0.9)
    variant = given.variant(260)
    told, kept = begin(given, variant, 260, np.zeros((rows, 64), np.int32), 3, np.full(rows, 3))
    state = {"tokens": numbers, "positions": numbers[:, None], "first": numbers, "slot": jnp.int32(3), "kept": kept}
    frequencies, ropes = model.frequencies(1)

    def program(trained, frozen, caches, state, told):
        return decode_pass.say(trained, frozen, caches, state, told, frequencies, model.structure, ropes, variant, 2)

    text = lowered_for_cuda(program, model.trained, model.frozen, caches, state, told)
    for kernel in ("nf4_matvec", "cache_append", "cache_attend"):
        assert kernel in text, kernel
