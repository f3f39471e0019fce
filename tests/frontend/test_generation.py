"""Generation: the filters against transformers' own, greedy answers against transformers.generate, stops and streaming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.generation import (
    GenerationSettings,
    choose,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from jaxsloth.models.registry import spec_from_config
from tests.support.sources import DictSource, transformers_model
from tests.support.tiny import CONFIG, byte_tokenizer, random_weights

LOGITS = np.random.Generator(np.random.Philox(0)).normal(0, 3, (20, 97)).astype(np.float32)


@pytest.mark.parametrize(
    ("ours", "judge"),
    [
        (lambda x: keep_top_k(x, 5), TopKLogitsWarper(5)),
        (lambda x: keep_top_k(x, 500), TopKLogitsWarper(500)),
        (lambda x: keep_top_p(x, 0.8), TopPLogitsWarper(0.8)),
        (lambda x: keep_top_p(x, 0.01), TopPLogitsWarper(0.01)),
        (lambda x: keep_min_p(x, 0.1), MinPLogitsWarper(0.1)),
    ],
    ids=["top_k", "top_k_all", "top_p", "top_p_one", "min_p"],
)
def test_filters_are_transformers(ours, judge):
    expected = judge(torch.zeros(len(LOGITS), 1, dtype=torch.long), torch.from_numpy(LOGITS.copy())).numpy()
    assert np.array_equal(np.stack([ours(row) for row in LOGITS]), expected)


def test_repetition_penalty_is_transformers():
    seen = np.random.Generator(np.random.Philox(1)).integers(0, 97, (20, 9))
    judge = RepetitionPenaltyLogitsProcessor(1.3)(torch.from_numpy(seen), torch.from_numpy(LOGITS.copy())).numpy()
    ours = np.stack([penalize_repetition(row, ids, 1.3) for row, ids in zip(LOGITS, seen, strict=True)])
    assert np.allclose(ours, judge, rtol=1e-6)


def test_sampling_follows_the_probabilities():
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    settings = GenerationSettings(do_sample=True, seed=3)
    counts = np.bincount([choose(logits, np.zeros(1, int), settings, 0, p) for p in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.6, 0.3, 0.1]).max() < 0.03


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


def test_sampling_is_the_same_on_both_backends(weights):
    settings = GenerationSettings(max_new_tokens=12, do_sample=True, temperature=0.9, top_k=50, top_p=0.95, seed=8, eos_ids=())
    answers = []
    for backend in ("torch", "jax"):
        built = load_backend(backend).build(spec_from_config(CONFIG), DictSource(weights), BuildOptions())
        answers.append(generate(built, PROMPTS, settings))
    assert answers[0] == answers[1]
    assert answers[0] != generate(built, PROMPTS, GenerationSettings(max_new_tokens=12, do_sample=True, seed=9, eos_ids=()))


class Scripted:
    """A model that says given tokens."""

    def __init__(self, rows):
        self.rows, self.spec = rows, spec_from_config(CONFIG)

    def start_decode(self, input_ids, lengths, capacity):
        self.place = 0
        return self, self.step(np.zeros(len(self.rows)))

    def step(self, tokens):
        logits = np.zeros((len(self.rows), 260), np.float32)
        for row, script in enumerate(self.rows):
            logits[row, script[min(self.place, len(script) - 1)]] = 1.0
        self.place += 1
        return logits

    def greedy(self, tokens, count):
        for _ in range(count):
            tokens = self.step(tokens).argmax(axis=1)
            yield tokens[:, None]


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
        ({"do_sample": True, "temperature": 0.0}, r"temperature must be positive .*, got 0.0"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
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
