"""generate() with torch tensors, over the KV cache: transformers' tokens, its ends, streams and stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, TextStreamer
from transformers.generation import GenerationMixin

from jaxsloth import FastLanguageModel
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
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01}

    def sample(backend, seed):
        torch.manual_seed(seed)
        return models[backend].generate(**PROMPTS, **settings, pad_token_id=1)

    first = sample("torch", 1)
    assert torch.equal(first, sample("torch", 1)) and torch.equal(first, sample("jax", 1))
    assert not torch.equal(first, sample("torch", 2))


@both
def test_what_is_not_cached_is_transformers(models, backend):
    """Beams, and prompts that are padded on the right: slower, and the same."""
    settings = {"max_new_tokens": 5, "num_beams": 2, "pad_token_id": 1}
    assert torch.equal(models[backend].generate(**PROMPTS, **settings), models["judge"].generate(**PROMPTS, **settings))
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
