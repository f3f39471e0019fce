"""Generation: greedy answers against transformers.generate, sampled ones on both backends, stops and streaming."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.generation import GenerationSettings, generate
from jaxsloth.models.registry import spec_from_config
from jaxsloth.torch_backend.model import TorchModel
from tests.support.sources import DictSource, transformers_model
from tests.support.tiny import CONFIG, byte_tokenizer, random_weights


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG, 4)


@pytest.fixture(scope="module", params=["torch", "jax"])
def model(request, weights):
    return load_backend(request.param).build(spec_from_config(CONFIG), DictSource(weights), BuildOptions())


PROMPTS = [[5, 9, 77, 30], [200, 3, 4, 8, 15, 16, 23, 42, 99], [7]]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_is_transformers(model, weights, penalty):
    judge = transformers_model(CONFIG, weights)
    settings = GenerationSettings(max_new_tokens=24, eos_ids=(), repetition_penalty=penalty)
    together = generate(model, PROMPTS, settings)
    for prompt, ours in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([prompt])
        expected = judge.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours == expected[0, len(prompt) :].tolist()
        assert generate(model, [prompt], settings) == [ours]


SAMPLED = GenerationSettings(max_new_tokens=12, do_sample=True, temperature=0.9, top_p=0.95, seed=8, eos_ids=())


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"top_k": 9, "repetition_penalty": 1.2}, marks=pytest.mark.slow)], ids=str
)
def test_sampling_is_the_same_on_both_backends_and_whatever_the_candidates(weights, settings, monkeypatch):
    """Too few candidates are noticed, and all are asked: at the first token and later."""
    answers, settings = [], replace(SAMPLED, **settings)
    for backend, few in (("torch", 4), ("torch", 24), ("torch", 1000), ("jax", 4)):
        built = load_backend(backend).build(spec_from_config(CONFIG), DictSource(weights), BuildOptions())
        monkeypatch.setattr("jaxsloth.sampling.CANDIDATES", few)
        answers.append(generate(built, PROMPTS, settings))
    assert all(answer == answers[0] for answer in answers)


def test_seeds(weights):
    """Another seed says something else; a row says the same alone, with a seed of its own."""
    built = load_backend("torch").build(spec_from_config(CONFIG), DictSource(weights), BuildOptions())
    assert generate(built, PROMPTS, SAMPLED) != generate(built, PROMPTS, replace(SAMPLED, seed=9))
    own = generate(built, PROMPTS, replace(SAMPLED, seed=[4, 5, 6]))
    assert generate(built, PROMPTS[1:2], replace(SAMPLED, seed=[5])) == [own[1]]


def test_logits_that_are_not_numbers_are_named(weights):
    built = load_backend("torch").build(spec_from_config(CONFIG), DictSource(weights), BuildOptions())
    assert isinstance(built, TorchModel)
    built.decoder.get_parameter("model.norm.weight").data.fill_(np.nan)
    for settings in (SAMPLED, replace(SAMPLED, do_sample=False)):
        with pytest.raises(ValueError, match=r"row 0 has no token to choose after 0 new ones: its logits are NaN"):
            generate(built, PROMPTS, settings)


class Scripted:
    """A model that says given tokens."""

    def __init__(self, rows):
        self.rows, self.spec = rows, spec_from_config(CONFIG)

    def start_decode(self, input_ids, lengths, capacity):
        return self

    def choose(self, sampling, count):
        for place in range(count):
            yield np.array([[script[min(place, len(script) - 1)]] for script in self.rows], np.int32)


def run_script(texts, **settings):
    tokenizer = byte_tokenizer()
    rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 1] for text in texts]
    pieces = [[] for _ in texts]
    answers = generate(
        Scripted(rows),
        [[5]] * len(texts),
        GenerationSettings(**settings),
        tokenizer=tokenizer,
        on_text=lambda row, text: pieces[row].append(text),
    )
    return [tokenizer.decode(answer) for answer in answers], pieces


def test_rows_end_at_eos_and_stream_what_they_say():
    answers, pieces = run_script(["duck", "a longer row"])
    assert answers == ["duck", "a longer row"]
    assert ["".join(row) for row in pieces] == answers and len(pieces[1]) > 4


def test_a_stop_string_is_cut_off_and_never_streamed():
    answers, pieces = run_script(["one END two", "EN and END"], stop=("END",))
    assert answers == ["one ", "EN and "]
    assert ["".join(row) for row in pieces] == answers


def test_characters_are_streamed_whole():
    answers, pieces = run_script(["añ→🦆!"])
    assert answers == ["añ→🦆!"]
    assert all("\ufffd" not in piece for piece in pieces[0]) and "🦆" in pieces[0]


def test_length_limit():
    assert run_script(["abcdefgh"], max_new_tokens=3)[0] == ["abc"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"stop": ("",)}, "not empty"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**settings)


def test_wrong_prompts(model):
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            generate(model, prompts, GenerationSettings())
    with pytest.raises(ValueError, match="need the tokenizer"):
        generate(model, [[1]], GenerationSettings(stop=("x",)))
