"""generate() with torch tensors, over the KV cache: transformers' tokens, its ends, streams and stops."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, TextStreamer
from transformers.generation import GenerationMixin

from jaxsloth import FastLanguageModel
from jaxsloth.frontend.decoding import _say_slow
from jaxsloth.frontend.module.causal_lm import JaxslothForCausalLM
from tests.support.modules import BACKENDS, adapted, batch, their_base
from tests.support.tiny import write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
PROMPTS = {name: value[:, :14] for name, value in batch((14, 9, 3), left=True).items() if name != "labels"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours by backend and transformers', under the same adapters."""
    folder = write_checkpoint(tmp_path_factory.mktemp("answers") / "model")
    made = {}
    for backend in BACKENDS:
        base, _ = FastLanguageModel.from_pretrained(str(folder), backend=backend, load_in_4bit=False, max_seq_length=64)
        made[backend] = FastLanguageModel.for_inference(adapted(base))
    return made | {"judge": adapted(their_base()).eval()}


@pytest.fixture
def cached_only(monkeypatch):
    """transformers' own loop, a whole pass a token, must not be what answers."""

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the cached decoder was to answer")

    monkeypatch.setattr(GenerationMixin, "generate", refuse)


@both
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 24, "do_sample": False},
        {"max_new_tokens": 12, "repetition_penalty": 1.5, "use_cache": True, "temperature": 1.0},
        {"max_length": 20, "pad_token_id": 7},
        {"max_new_tokens": 24, "eos_token_id": [40, 41, 42, 50, 60, 70, 80, 90, 100, 200], "pad_token_id": 3},
    ],
    ids=["greedy", "penalty", "max_length", "ends"],
)
def test_greedy_answers_are_transformers(models, backend, settings, monkeypatch):
    expected = models["judge"].generate(**PROMPTS, **{"pad_token_id": 1} | settings)
    monkeypatch.setattr(GenerationMixin, "generate", None)
    answer = models[backend].generate(**PROMPTS, **{"pad_token_id": 1} | settings)
    assert answer.dtype == torch.int64 and torch.equal(answer, expected)
    one = {"input_ids": PROMPTS["input_ids"][:1]}
    assert torch.equal(models[backend].generate(**one, **settings)[0, :20], expected[0, :20])


@both
def test_an_adapter_that_is_off_or_written_is_seen(models, backend, cached_only):
    model = models[backend]
    settings = {"max_new_tokens": 12, "pad_token_id": 1}
    with_adapter = model.generate(**PROMPTS, **settings)
    with model.disable_adapter():
        off = model.generate(**PROMPTS, **settings)
    assert not torch.equal(off, with_adapter)
    assert torch.equal(model.generate(**PROMPTS, **settings), with_adapter)
    parameter = next(p for name, p in model.named_parameters() if "lora_B" in name)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.mul_(-40.0)
    assert not torch.equal(model.generate(**PROMPTS, **settings), with_adapter)
    with torch.no_grad():
        parameter.copy_(kept)


@both
def test_streams_and_stops(models, backend, capsys, cached_only):
    model = models[backend]
    tokenizer = model.get_base_model().tokenizer
    ids = PROMPTS["input_ids"][:1]
    whole = model.generate(input_ids=ids, max_new_tokens=16, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip("\n") == tokenizer.decode(whole[0, ids.shape[1] :]).strip("\n")

    class AtFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **others):
            return torch.full((len(input_ids),), input_ids.shape[1] >= ids.shape[1] + 5)

    stopped = model.generate(input_ids=ids, max_new_tokens=16, stopping_criteria=[AtFive()])
    assert torch.equal(stopped, whole[:, : ids.shape[1] + 5])


@both
def test_the_tokenizers_own_end_ends_an_answer(models, backend, cached_only, monkeypatch):
    """A chat template may have renamed it since the checkpoint's config was written."""
    model = models[backend]
    ids = PROMPTS["input_ids"][:1]
    whole = model.generate(input_ids=ids, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    tokenizer = model.get_base_model().tokenizer
    monkeypatch.setattr(
        tokenizer,
        "_special_tokens_map",
        tokenizer._special_tokens_map | {"eos_token": tokenizer.convert_ids_to_tokens(whole[2])},
    )
    ended = model.generate(input_ids=ids, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    assert ended == whole[: whole.index(whole[2]) + 1]


def test_sampling_follows_torchs_seed_on_both_backends(models, cached_only):
    """One draw of torch's generator, or of the one that is given, is a call's seed."""
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    settings |= {"repetition_penalty": 1.1, "num_return_sequences": 2}
    answers = {}
    for backend in BACKENDS:
        sample = partial(models[backend].generate, **PROMPTS, **settings, pad_token_id=1)
        torch.manual_seed(1)
        first, second = sample(), sample()
        torch.manual_seed(1)
        assert torch.equal(sample(), first) and not torch.equal(second, first)
        assert len(first) == 6 and not torch.equal(first[0], first[1]) and torch.equal(first[0, :14], first[1, :14])
        given = sample(generator=torch.Generator().manual_seed(1))
        assert torch.equal(sample(generator=torch.Generator().manual_seed(1)), given) and torch.equal(given, first)
        answers[backend] = first
    assert torch.equal(*answers.values())
    with pytest.raises(ValueError, match="can't take generator= together with num_beams"):
        models["torch"].generate(**PROMPTS, num_beams=2, generator=torch.Generator())


@pytest.fixture
def whole_passes(monkeypatch):
    """A list that grows by one with every pass over whole rows."""
    passes: list[int] = []
    prepare = JaxslothForCausalLM.prepare

    def counted(self: Any, ids: torch.Tensor, *others: Any, **settings: Any) -> Any:
        passes.append(ids.shape[1])
        return prepare(self, ids, *others, **settings)

    monkeypatch.setattr(JaxslothForCausalLM, "prepare", counted)
    return passes


class Shifted(LogitsProcessor):
    """Favours tokens by what was said before, so that a wrong prefix shows."""

    def __call__(self, input_ids, scores):
        return scores + torch.cos(torch.arange(scores.shape[1]) * (1 + input_ids[:, -2:].sum(1, keepdim=True)))


@both
@pytest.mark.parametrize(
    "settings",
    [
        {"logits_processor": LogitsProcessorList([Shifted()])},
        {"logits_processor": LogitsProcessorList([Shifted()]), "do_sample": True, "temperature": 0.8, "top_k": 40},
        {"num_beams": 2},
        {"num_beams": 3, "length_penalty": 0.5, "eos_token_id": list(range(40, 60)), "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"renormalize_logits": True, "top_h": 0.4, "do_sample": True, "num_return_sequences": 3},
    ],
    ids=["processor", "processor, sampled", "beams", "beams that end", "beams, sampled", "several"],
)
def test_transformers_loop_runs_over_the_cache(models, backend, settings, whole_passes):
    answers = []
    for name in (backend, "judge"):
        torch.manual_seed(3)
        answers.append(models[name].generate(**PROMPTS, **{"max_new_tokens": 16, "pad_token_id": 1} | settings))
    assert torch.equal(*answers) and whole_passes == []


def test_what_is_left_to_transformers_is_said_once(models, caplog):
    _say_slow.cache_clear()
    for _ in range(2):
        models["torch"].generate(**PROMPTS, max_new_tokens=2, num_beams=2, logits_processor=[Shifted()], pad_token_id=1)
    assert [message.split(" is answered")[0] for message in caplog.messages] == [
        "generate: logits_processor",
        "generate: num_beams",
    ]
    models["torch"].generate(**PROMPTS, max_new_tokens=2, do_sample=True, typical_p=0.9, pad_token_id=1)
    assert len(caplog.messages) == 2


@both
def test_scores_and_switched_off_adapters(models, backend, whole_passes):
    settings = {"max_new_tokens": 6, "pad_token_id": 1, "output_scores": True, "return_dict_in_generate": True}
    ours, judge = (models[name].generate(**PROMPTS, **settings) for name in (backend, "judge"))
    for mine, theirs in zip(ours.scores, judge.scores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    with models[backend].disable_adapter():
        off = models[backend].generate(**PROMPTS, **settings)
    assert not torch.equal(off.scores[0], ours.scores[0]) and whole_passes == []


@both
def test_what_is_not_cached_is_transformers(models, backend, whole_passes):
    """Prompts that are padded on the right, guidance, and whoever asks for it: slower, and the same."""
    for other in ({"num_beams": 2, "use_cache": False}, {"guidance_scale": 1.5}):
        settings = {"max_new_tokens": 5, "pad_token_id": 1} | other
        assert torch.equal(models[backend].generate(**PROMPTS, **settings), models["judge"].generate(**PROMPTS, **settings))
    assert whole_passes[:5] == [14, 15, 16, 17, 18] and len(whole_passes) == 15
    right = {name: value[:, :14] for name, value in batch((14, 9)).items() if name != "labels"}
    settings = {"max_new_tokens": 3, "pad_token_id": 1}
    ours, judge = (models[name].generate(**right, **settings) for name in (backend, "judge"))
    assert torch.equal(ours[0], judge[0])


def test_unknown_settings_name_the_nearest(models):
    with pytest.raises(TypeError, match="did you mean 'max_new_tokens'"):
        models["torch"].generate(**PROMPTS, max_new_token=3)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        models["torch"].generate("the duck", temprature=3)
    assert isinstance(models["torch"].generate("the duck", max_new_tokens=2), str)
