"""The decoding programs on the CPU, torch's without its graph: word for word what the layers say."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from jaxsloth.backend import OptimizerOptions
from jaxsloth.generation import generate
from jaxsloth.kernels.registry import RefusedError
from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.spec import Rope, RopeScaling
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.sampling import GREEDY
from jaxsloth.torch_backend import generate as torch_generate
from jaxsloth.transforms import quantize
from tests.support.decoding import (
    PROMPTS,
    SETTINGS,
    VARIANTS,
    adapted,
    build,
    of_layers,
    padded,
    random_tensors,
)
from tests.support.sources import transformers_model
from tests.support.tiny import CONFIG


@pytest.mark.parametrize("with_adapters", [pytest.param(False, marks=pytest.mark.slow), True], ids=["base", "adapted"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_says_what_the_layers_say(variant, with_adapters):
    biased = {"attention_bias": True, "mlp_bias": True} if with_adapters else {}
    spec = VARIANTS[variant](spec_from_config(CONFIG | biased))
    answers = []
    for name in ("fused", "composed"):
        model = build("torch", spec, name)
        if with_adapters:
            model.add_adapters(*adapted(model))
        answers.append(generate(model, PROMPTS, SETTINGS))
    assert answers[0] == answers[1]
    assert len({tuple(row) for row in answers[0]}) == 3 and all(len(row) == 12 for row in answers[0])


def test_it_says_what_transformers_says():
    spec = spec_from_config(CONFIG)
    tensors = random_tensors(spec)
    judge = transformers_model(CONFIG, tensors)
    answers = generate(build("torch", spec, "fused", tensors), PROMPTS, SETTINGS)
    for prompt, ours in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        expected = judge.generate(ids, eos_token_id=None, pad_token_id=0, **asked)
        assert ours == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rows", [1, 17])
def test_any_number_of_rows(rows):
    spec = quantize(spec_from_config(CONFIG), nested=True)
    prompts = [[3 + row, 9, 12][: 1 + row % 3] for row in range(rows)]
    assert generate(build("torch", spec, "fused"), prompts, SETTINGS) == generate(
        build("torch", spec, "composed"), prompts, SETTINGS
    )


def test_a_program_serves_many_requests_and_sees_new_adapters():
    spec = quantize(spec_from_config(CONFIG), nested=False)
    model, judge = build("torch", spec, "fused"), build("torch", spec, "composed")
    lora, values = adapted(model)
    for one in (model, judge):
        one.add_adapters(lora, values)
    first = generate(model, PROMPTS, SETTINGS)
    program = model.idle_program
    assert program is not None and first == generate(judge, PROMPTS, SETTINGS)
    _, others = adapted(model, seed=6)
    for one in (model, judge):
        one.load_trainable(others)
    second = generate(model, PROMPTS[::-1], SETTINGS)
    assert model.idle_program is program
    assert second == generate(judge, PROMPTS[::-1], SETTINGS) != first[::-1]
    generate(model, PROMPTS[:2], SETTINGS)
    assert model.idle_program is not program
    model.step(CausalLoss(), OptimizerOptions())
    assert model.idle_program is None


def test_two_requests_at_once_do_not_share_a_cache():
    model = build("torch", spec_from_config(CONFIG), "fused")
    expected = [generate(model, [prompt], SETTINGS)[0] for prompt in PROMPTS[:2]]
    states = [model.start_decode(np.array([prompt], np.int32), np.array([len(prompt)], np.int32), 40) for prompt in PROMPTS[:2]]
    said = list(zip(*(state.choose(GREEDY, 12) for state in states), strict=True))
    for place in range(2):
        assert np.concatenate([bursts[place] for bursts in said], axis=1)[0].tolist() == expected[place]


def test_steps_may_follow_bursts():
    model, judge = (build("torch", spec_from_config(CONFIG), name) for name in ("fused", "composed"))
    logits = []
    for one in (model, judge):
        state = one.start_decode(np.array([PROMPTS[0]], np.int32), np.array([4], np.int32), 20)
        bursts = list(state.choose(GREEDY, 11))
        assert sum(burst.shape[1] for burst in bursts) == 11
        logits.append(state.step(bursts[-1][:, -1]))
        with pytest.raises(ValueError, match="6 more tokens do not fit: the cache has 5 slots left"):
            state.choose(GREEDY, 7)
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


def test_a_large_cache_is_not_kept(monkeypatch):
    monkeypatch.setattr(torch_generate, "KEPT_BYTES", 1000)
    model = build("torch", spec_from_config(CONFIG), "fused")
    generate(model, PROMPTS, SETTINGS)
    gc.collect()
    assert model.idle_program is None


def test_prompts_are_read_in_parts(monkeypatch):
    spec = of_layers(spec_from_config(CONFIG), lambda index: {"window": 4 if index % 2 else None})
    whole = [build("torch", spec, name).start_decode(*padded(), 9).logits() for name in ("fused", "composed")]
    monkeypatch.setattr(torch_generate, "PREFILL", 9)  # three slots at a time
    parts = [build("torch", spec, name).start_decode(*padded(), 9).logits() for name in ("fused", "composed")]
    for logits in (*whole, *parts):
        assert np.abs(logits - whole[0]).max() < 1e-5


def test_what_it_refuses():
    spec = spec_from_config(CONFIG)
    stretched = Rope(10000.0, 16, RopeScaling("dynamic", 2.0))
    with pytest.raises(RefusedError, match="dynamic scaling changes them with the length"):
        build("torch", of_layers(spec, lambda _: {"rope": stretched}), "fused").start_decode(*padded(), 10)
    with pytest.raises(RefusedError, match="no implementation 'graph'"):
        build("torch", spec, "graph").start_decode(*padded(), 10)
    assert generate(build("torch", of_layers(spec, lambda _: {"rope": stretched}), None), PROMPTS, SETTINGS)


def test_it_draws_what_the_layers_draw():
    """One program for all that is sampled; the numbers are its arrays."""
    spec = quantize(spec_from_config(CONFIG), nested=True)
    settings = [replace(SETTINGS, do_sample=True, top_k=20, **more) for more in ({"top_p": 0.9}, {"temperature": 1.5})]
    settings.append(replace(settings[0], repetition_penalty=1.3, no_repeat_ngram_size=2, seed=4))
    model, judge = (build("torch", spec, name) for name in ("fused", "composed"))
    assert [generate(model, PROMPTS, one) for one in settings] == [generate(judge, PROMPTS, one) for one in settings]
    assert len(model.idle_program._samplers) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["top_k", "nucleus", "ordered", "plain", "rare", "processors"])
def test_graphs_draw_what_the_layers_draw_and_are_recorded_once(kind):
    spec = quantize(spec_from_config(CONFIG | {"vocab_size": 20000}), nested=True)
    more = {
        "top_k": {"top_k": 50, "top_p": 0.9},
        "nucleus": {"top_p": 0.5, "temperature": 0.3},
        "ordered": {"top_k": 1000},
        "plain": {"min_p": 0.01},
        "rare": {"typical_p": 0.9, "eta_cutoff": 1e-3, "top_k": 100},
        "processors": {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[5], [6, 7]],
            "min_new_tokens": 9,
        },
    }[kind]
    sampled, answers = replace(SETTINGS, do_sample=True, max_new_tokens=40, eos_ids=(9,), **more), []
    for name in ("fused", "composed"):
        model = build("torch", spec, name)
        answers.append(generate(model, PROMPTS, sampled))
        if name == "fused":
            program, recorded = model.idle_program, model.idle_program.recorded
            assert recorded == 2
            generate(model, [[3], *PROMPTS[:2]], replace(sampled, temperature=1.2, seed=7))
            assert model.idle_program is program and program.recorded == recorded
    assert answers[0] == answers[1]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_says_what_the_layers_say(variant, rows):
    spec = VARIANTS[variant](spec_from_config(CONFIG))
    prompts, answers = [PROMPTS[row % 3] for row in range(rows)], []
    for name in ("fused", "composed"):
        model = build("torch", spec, name)
        model.add_adapters(*adapted(model))
        answers.append([generate(model, prompts, replace(SETTINGS, max_new_tokens=count)) for count in (40, 25)])
        if name == "fused":
            assert model.idle_program._graph is not None
    assert answers[0] == answers[1]
