"""Tokens chosen on the device: transformers' processors judge what is left, the exact probabilities what is drawn."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig, GenerationMixin

from jaxsloth import sampling as sampling_module
from jaxsloth.backend import BACKENDS
from jaxsloth.frontend.decoding import sampling_of
from jaxsloth.jax_backend import sampling as jax_sampling
from jaxsloth.sampling import NO_CHOICE, NOTHING, Sampling
from jaxsloth.torch_backend.sampling import Sampler

VOCAB, ROWS, LENGTH, NEW = 1000, 6, 12, 3
EOS = [7, 8]
# What a call says -> how the judge's processors are made. NEW tokens have been said when they are applied.
CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "min_p of one": {"min_p": 1.0},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k of all": {"top_k": 5000},
    "top_k over the candidates": {"top_k": 200},
    "top_p": {"top_p": 0.8},
    "top_p of one": {"top_p": 0.0},
    "top_p of many": {"top_p": 0.999, "temperature": 2.0},
    "usual": {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "typical": {"typical_p": 0.4},
    "typical after top_k": {"typical_p": 0.9, "top_k": 15},
    "epsilon": {"epsilon_cutoff": 0.01},
    "eta": {"eta_cutoff": 0.02},
    "eta after top_p": {"eta_cutoff": 0.02, "top_p": 0.6},
    "penalty": {"repetition_penalty": 1.4},
    "ngrams of one": {"no_repeat_ngram_size": 1},
    "ngrams of two": {"no_repeat_ngram_size": 2, "top_k": 20},
    "ngrams of three": {"no_repeat_ngram_size": 3},
    "long ngrams": {"no_repeat_ngram_size": 40},
    "min_new_tokens": {"min_new_tokens": NEW + 1},
    "min_new_tokens reached": {"min_new_tokens": NEW},
    "min_length": {"min_length": LENGTH + NEW + 1},
    "suppressed": {"suppress_tokens": [3, 4, 900]},
    "suppressed at first": {"begin_suppress_tokens": [3, 4, 900]},
    "bad words": {"bad_words_ids": [[7], [5], [1, 2], [2, 3, 4], [9, 9, 9, 9, 9, 9], [999]]},
    "everything": {
        "temperature": 0.8,
        "top_k": 22,
        "top_p": 0.95,
        "min_p": 0.02,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": 1e-3,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "suppress_tokens": [11],
        "begin_suppress_tokens": [12],
        "bad_words_ids": [[13], [1, 2]],
    },
    "greedy, everything": {
        "do_sample": False,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "suppress_tokens": [11],
        "bad_words_ids": [[13], [1, 2]],
    },
}
TIED = ("min_p", "top_k", "top_p", "top_p of many", "usual", "typical after top_k", "everything")  # on equal logits as well
UNCHANGED = {"top_k of all", "min_new_tokens reached", "long ngrams"}


def made_logits(tied: bool) -> np.ndarray:
    """float32 ``[ROWS, VOCAB]``, in steps of a half where they are to be tied."""
    found = np.random.Generator(np.random.Philox(1)).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    return np.round(found * 2) / 2 if tied else found


def made_ids() -> tuple[np.ndarray, np.ndarray]:
    """(ids ``[ROWS, LENGTH + NEW]`` in which sequences come again, padded on the left by zeros; how many tokens count)."""
    ids = np.random.Generator(np.random.Philox(2)).integers(1, 4, (ROWS, LENGTH + NEW)).astype(np.int32)
    ids[1, -1] = ids[2, -3] = 9
    ids[3, -5:] = 9
    lengths = np.array([LENGTH, 3, 1, 7, LENGTH, 5], np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[: LENGTH - length] = 0
    return ids, lengths + np.int32(NEW)


def judge_of(config: GenerationConfig, mask: torch.Tensor | None = None) -> Any:
    """transformers' processors."""
    config._eos_token_tensor = torch.tensor(EOS)
    judge = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False), _merge_criteria_processor_list=lambda own, _: own)
    return GenerationMixin._get_logits_processor(
        judge,  # type: ignore[arg-type]
        config,
        input_ids_seq_length=LENGTH,
        device="cpu",
        model_kwargs={"attention_mask": mask},
    )


def judged(config: GenerationConfig, logits: np.ndarray, said: int) -> np.ndarray:
    """What transformers' processors leave of logits after `said` new tokens."""
    ids, lengths = made_ids()
    ids = torch.from_numpy(ids[:, : LENGTH + said].astype(np.int64))
    mask = torch.arange(LENGTH) >= torch.from_numpy(LENGTH + NEW - lengths)[:, None]
    processors = judge_of(config, mask.long())
    with pytest.MonkeyPatch.context() as patch:  # of equal scores another comes first as it happens
        patch.setattr(torch, "sort", partial(torch.sort, stable=True))
        return processors(ids, torch.from_numpy(logits.copy())).numpy()


def on_torch(sampling: Sampling, variant: Any, logits: np.ndarray, said: int) -> Any:
    """(scores, their tokens, whose candidates are too few) after the prompts, which are told at once, and `said` tokens, which
    are remembered one by one."""
    ids, lengths = made_ids()
    sampler = Sampler(variant, ROWS, LENGTH + NEW + 4, VOCAB, torch.device("cpu"))
    sampler.begin(sampling, ids[:, :LENGTH], lengths - NEW)
    for place in range(LENGTH, LENGTH + said):
        sampler.remember(torch.from_numpy(ids[:, place].astype(np.int64)), torch.tensor([place]))
    left = sampler.processed(torch.from_numpy(logits.copy()), torch.tensor([LENGTH + said]))
    return [left, None, None] if variant.kind == "greedy" else sampler.scores(left)


def on_jax(sampling: Sampling, variant: Any, logits: np.ndarray, said: int) -> Any:
    """The same."""
    ids, lengths = made_ids()
    slots = np.pad(ids, ((0, 0), (0, 4)), constant_values=NOTHING)
    slots[:, LENGTH:] = NOTHING
    numbers, kept = jax_sampling.begin(sampling, variant, VOCAB, slots, LENGTH, lengths - NEW)

    @jax.jit
    def run(logits: Any, numbers: Any, kept: Any, tokens: Any) -> Any:
        for place in range(said):
            kept = jax_sampling.remembered(kept, tokens[:, place], np.int32(LENGTH + place), variant)
        left = jax_sampling.processed(logits, numbers, kept, np.int32(LENGTH + said), variant)
        return (left, None, None) if variant.kind == "greedy" else jax_sampling.scores(left, numbers, variant)

    return run(logits, numbers, kept, ids[:, LENGTH:])


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def probabilities(scores: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """float64 ``[ROWS, VOCAB]``."""
    found = softmax(scores)
    if ids is None:
        return found
    whole = np.zeros((ROWS, VOCAB))
    np.put_along_axis(whole, ids, found, axis=1)
    return whole


both = pytest.mark.parametrize("run", [on_torch, on_jax], ids=["torch", "jax"])


@both
@pytest.mark.parametrize(("case", "tied"), [*((case, False) for case in CASES), *((case, True) for case in TIED)], ids=str)
def test_what_is_left_is_transformers(case, tied, run, monkeypatch):
    """The same tokens and probabilities; where the candidates are too few, after all are asked instead."""
    monkeypatch.setattr(sampling_module, "CANDIDATES", 24)
    given = {"do_sample": True, "eos_token_id": EOS, "max_length": 64} | CASES[case]
    logits, early = made_logits(tied), "first" in case
    for said in (0, NEW) if early else (NEW,):
        expected = judged(GenerationConfig(**given), logits, said)
        settings = sampling_of(GenerationConfig(**given), LENGTH)
        for everything in (False, True):
            variant = settings.variant(VOCAB, everything)
            scores, ids, few = (None if part is None else np.asarray(part) for part in run(settings, variant, logits, said))
            if variant.kind == "greedy":
                assert np.array_equal(scores, expected)
                continue
            asked = np.ones(ROWS, bool) if few is None else ~few
            assert asked.all() if everything else tied or asked.any() == (case != "top_p of many")
            found, wanted = probabilities(scores, ids), softmax(expected)
            assert np.array_equal(found[asked] > 0, wanted[asked] > 0)
            np.testing.assert_allclose(found[asked], wanted[asked], rtol=0, atol=1e-6)
    assert early or not np.array_equal(softmax(expected), softmax(logits)) or case in UNCHANGED


def drawn(backend: str, sampling: Sampling, logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A token a row, the same logits ``[vocab]`` in each, at positions int32 ``[rows]``."""
    rows, vocab = len(positions), len(logits)
    variant, ids, many = sampling.variant(vocab), np.zeros((rows, 4), np.int32), np.tile(logits, (rows, 1))
    if backend == "torch":
        sampler = Sampler(variant, rows, 4, vocab, torch.device("cpu"))
        sampler.begin(sampling, ids[:, :2], np.full(rows, 2))
        return sampler.choose(torch.from_numpy(many), torch.tensor([2]), torch.from_numpy(positions))[0].numpy()
    numbers, kept = jax_sampling.begin(sampling, variant, vocab, ids, 2, np.full(rows, 2))
    return np.asarray(jax_sampling.first(many, numbers, kept, np.int32(2), positions, variant=variant)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.3},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.9},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.4, "top_k": 30},
    ],
    ids=str,
)
def test_draws_have_the_exact_probabilities(settings, monkeypatch):
    """Chi-square of what rows draw, and the same draws on both backends."""
    monkeypatch.setattr(sampling_module, "CANDIDATES", 12)
    logits, count = np.random.Generator(np.random.Philox(5)).normal(0, 1.5, 40).astype(np.float32), 30_000
    config = GenerationConfig(do_sample=True, max_length=64, **settings)
    with torch.no_grad():
        left = judge_of(config)(torch.zeros(1, 2, dtype=torch.long), torch.from_numpy(logits[None].copy())).numpy()
    expected = softmax(left)[0] * count
    found = [drawn(name, Sampling(do_sample=True, seed=11, **settings), logits, np.zeros(count, np.int32)) for name in BACKENDS]
    assert np.array_equal(*found)
    counts = np.bincount(found[0], minlength=40)
    assert np.array_equal(counts > 0, expected > 0)
    assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_is_of_its_seed_its_row_and_its_position(backend):
    logits, positions = np.zeros(50, np.float32), np.arange(200, dtype=np.int32)
    draw = partial(drawn, backend, logits=logits, positions=positions)
    first = draw(Sampling(do_sample=True, seed=2**40 + 3))
    assert np.array_equal(draw(Sampling(do_sample=True, seed=2**40 + 3)), first)
    for other in (3, 2**40 + 4):
        assert (draw(Sampling(do_sample=True, seed=other)) == first).mean() < 0.1
    later = drawn(backend, Sampling(do_sample=True, seed=2**40 + 3), logits, positions + 1)
    assert (later == first).mean() < 0.1
    # A seed a row: the row's number counts no more.
    own = draw(Sampling(do_sample=True, seed=[5] * 100 + [6] * 100))
    again = drawn(backend, Sampling(do_sample=True, seed=[6, 5]), logits, positions[[150, 30]])
    assert again.tolist() == [own[150], own[30]]
    with pytest.raises(ValueError, match="one number or one a row: 200 rows, got 3 seeds"):
        Sampling(do_sample=True, seed=[1, 2, 3]).check(50, 200)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 2}, {"do_sample": True, "top_p": 0.5}]
)
def test_logits_that_are_not_numbers_are_no_choice(backend, settings):
    logits = np.zeros(40, np.float32)
    logits[3] = np.nan
    assert drawn(backend, Sampling(**settings), logits, np.zeros(2, np.int32)).tolist() == [NO_CHOICE] * 2
    if settings:
        everything = Sampling(**settings, suppress_tokens=range(40))
        assert drawn(backend, everything, logits, np.zeros(2, np.int32)).tolist() == [NO_CHOICE] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be positive .*, got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        ({"typical_p": 0.0}, r"typical_p must be in \(0, 1\], got 0.0"),
        ({"epsilon_cutoff": 1.0}, r"epsilon_cutoff must be in \[0, 1\), got 1.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, got -1"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be sequences of at least one token each"),
        ({"suppress_tokens": [260]}, "suppress_tokens must be token ids of the model, from 0 to 259, got 260"),
        ({"bad_words_ids": [[1, -4]]}, "bad_words_ids must be token ids of the model, from 0 to 259, got -4"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(do_sample=True, **settings).check(260, 1)
