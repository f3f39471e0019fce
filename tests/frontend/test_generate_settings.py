"""generate()'s settings, field by field: transformers' tokens, its errors, or a refusal that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BatchEncoding, GenerationConfig, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from jaxsloth import FastLanguageModel
from jaxsloth.convert.safetensors_source import CheckpointError
from tests.support.modules import BACKENDS, batch
from tests.support.tiny import write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
PROMPTS = {name: value[:, :14] for name, value in batch((14, 9, 3), left=True).items() if name != "labels"}
ONE = {name: value[:1] for name, value in PROMPTS.items()}
MANY = list(range(2, 200))
# Every field of a GenerationConfig -> calls that set it. Sampling is judged where its filters leave one token.
FIELDS: dict[str, list[dict[str, Any]]] = {
    "max_length": [{"max_length": 20}, {"max_length": 10}, {}],
    "max_new_tokens": [{"max_new_tokens": 3}, {"max_new_tokens": 0}, {"max_new_tokens": -2}],
    "min_length": [{"min_length": 25, "eos_token_id": MANY}],
    "min_new_tokens": [{"min_new_tokens": 4, "eos_token_id": MANY}],
    "early_stopping": [{"early_stopping": True}, {"early_stopping": True, "num_beams": 2}],
    "max_time": [{"max_time": 0.0}, {"max_time": 100.0}],
    "stop_strings": [{"stop_strings": "a"}, {"stop_strings": ["!", "b"], "eos_token_id": None}],
    "do_sample": [{"do_sample": True, "top_k": 1}],
    "num_beams": [{"num_beams": 2}],
    "use_mtp": [{"use_mtp": True}],
    "use_cache": [{"use_cache": False, "max_new_tokens": 3}],
    "cache_implementation": [{"cache_implementation": "static"}, {"cache_implementation": "nothing"}],
    "cache_config": [{"cache_config": {}}],
    "max_cache_len": [{"max_cache_len": 60}],
    "temperature": [{"temperature": 0.0}, {"temperature": 0.0, "do_sample": True}],
    "top_k": [{"top_k": -1}, {"top_k": 0}, {"top_k": -1, "do_sample": True}],
    "top_p": [{"top_p": 0.0}, {"top_p": 0.0, "do_sample": True}, {"top_p": -0.1, "do_sample": True}],
    "min_p": [{"min_p": 2.0}, {"min_p": 1.0, "do_sample": True}, {"min_p": 2.0, "do_sample": True}],
    "top_h": [{"top_h": 0.4}, {"top_h": 0.4, "do_sample": True, "top_k": 1}],
    "typical_p": [{"typical_p": 0.5}, {"typical_p": 0.5, "do_sample": True, "top_k": 1}],
    "epsilon_cutoff": [{"epsilon_cutoff": 0.1}, {"epsilon_cutoff": 0.1, "do_sample": True, "top_k": 1}],
    "eta_cutoff": [{"eta_cutoff": 0.1}, {"eta_cutoff": 0.1, "do_sample": True, "top_k": 1}],
    "repetition_penalty": [{"repetition_penalty": 1.5}, {"repetition_penalty": 0.0}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.2}],
    "length_penalty": [{"length_penalty": 2.0}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 2}],
    "bad_words_ids": [{"bad_words_ids": [[5], [7, 8]]}],
    "renormalize_logits": [{"renormalize_logits": True}],
    "forced_bos_token_id": [{"forced_bos_token_id": 4}],
    "forced_eos_token_id": [{"forced_eos_token_id": 4}],
    "remove_invalid_values": [{"remove_invalid_values": True}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (2, 1.5)}],
    "suppress_tokens": [{"suppress_tokens": [5, 6]}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": [5, 6]}],
    "sequence_bias": [{"sequence_bias": {(5,): 30.0}}],
    "token_healing": [{"token_healing": True, "text": "the duck lays eggs"}],
    "guidance_scale": [{"guidance_scale": 1.5, "max_new_tokens": 3}],
    "watermarking_config": [{"watermarking_config": {"bias": 2.0}}],
    "num_return_sequences": [{"num_return_sequences": 2}, {"num_return_sequences": 2, "num_beams": 2}],
    "output_attentions": [{"output_attentions": True}],
    "output_hidden_states": [{"output_hidden_states": True}],
    "output_scores": [{"output_scores": True}],
    "output_logits": [{"output_logits": True, "return_dict_in_generate": True}],
    "return_dict_in_generate": [{"return_dict_in_generate": True}],
    "pad_token_id": [{"pad_token_id": 9, "eos_token_id": MANY}],
    "bos_token_id": [{"bos_token_id": 3, "no_prompt": True}],
    "eos_token_id": [{"eos_token_id": [5]}, {"eos_token_id": MANY}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 0}],
    "decoder_start_token_id": [{"decoder_start_token_id": 3}],
    "num_assistant_tokens": [{"num_assistant_tokens": 3}],
    "num_assistant_tokens_schedule": [{"num_assistant_tokens_schedule": "constant"}],
    "assistant_confidence_threshold": [{"assistant_confidence_threshold": 0.3}],
    "prompt_lookup_num_tokens": [{"prompt_lookup_num_tokens": 3, "one": True}],
    "max_matching_ngram_size": [{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "one": True}],
    "assistant_early_exit": [{"assistant_early_exit": 1}],
    "assistant_lookbehind": [{"assistant_lookbehind": 3}],
    "target_lookbehind": [{"target_lookbehind": 3}],
    "assistant_ensemble_weight": [{"assistant_ensemble_weight": 0.5}, {"assistant_ensemble_weight": 2.0}],
    "speculation_type": [{"speculation_type": "dflash"}],
    "is_assistant": [{"is_assistant": True}],
    "compile_config": [{"compile_config": 3}],
    "disable_compile": [{"disable_compile": True}],
    "continuous_batching_config": [{"continuous_batching_config": None}],
    "low_memory": [{"low_memory": True}],
    "penalty_alpha": [{"penalty_alpha": 0.6, "top_k": 4}],
    "dola_layers": [{"dola_layers": "low"}],
    "diversity_penalty": [{"diversity_penalty": 1.0, "num_beam_groups": 2, "num_beams": 4}],
    "num_beam_groups": [{"num_beam_groups": 1}],
    "constraints": [{"constraints": [1]}],
    "force_words_ids": [{"force_words_ids": [[5]], "num_beams": 2}],
    "prefill_chunk_size": [{"prefill_chunk_size": 4}],
}
# What transformers answers and no backend has: refused by name.
REFUSED = {"output_attentions", "output_hidden_states"}
PROVENANCE = {"transformers_version", "_from_model_config"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("settings") / "model")


@pytest.fixture(scope="module")
def models(folder):
    """Ours by backend and transformers', of one checkpoint."""
    made: dict[str, Any] = {backend: loaded(folder, backend) for backend in BACKENDS}
    return made | {"judge": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()}


def loaded(folder, backend):
    return FastLanguageModel.from_pretrained(str(folder), backend=backend, load_in_4bit=False, max_seq_length=64)[0]


def answered(model: Any, tokenizer: Any, settings: dict[str, Any]) -> torch.Tensor | str:
    """The tokens, or the kind of error."""
    settings = {"pad_token_id": 1, "tokenizer": tokenizer} | settings
    prompts = ONE if settings.pop("one", False) else {} if settings.pop("no_prompt", False) else PROMPTS
    if "text" in settings:
        prompts = {"input_ids": tokenizer(settings.pop("text"), return_tensors="pt")["input_ids"]}
    try:
        found = model.generate(**prompts, **settings)
    except Exception as error:  # whatever transformers raises
        return f"error: {error}"
    return found if isinstance(found, torch.Tensor) else found.sequences


def test_every_field_of_transformers_has_a_case():
    assert set(GenerationConfig().to_dict()) - PROVENANCE <= set(FIELDS)


@both
@pytest.mark.parametrize("field", FIELDS)
def test_each_field_is_transformers_or_refused_by_name(models, backend, field):
    tokenizer = models[backend].tokenizer
    for settings in FIELDS[field]:
        ours, judge = (answered(models[name], tokenizer, settings) for name in (backend, "judge"))
        if field in REFUSED:
            assert isinstance(ours, str) and f"generate can't take {field}=True: " in ours
        elif isinstance(judge, str):
            assert isinstance(ours, str) and "forward got" not in ours, settings
        else:
            assert not isinstance(ours, str), ours
            assert torch.equal(ours, judge), settings


@both
def test_an_assistant_of_either_kind_drafts(models, backend):
    model, judge = models[backend], models["judge"]
    expected = judge.generate(**ONE, max_new_tokens=12)
    for drafter in (judge, model):
        assert torch.equal(model.generate(**ONE, max_new_tokens=12, assistant_model=drafter), expected)


@both
def test_a_tokenizers_batch_is_taken_in_the_place_of_its_ids(models, backend):
    """As apply_chat_template hands it out since transformers 5."""
    model = models[backend]
    messages = [{"role": "user", "content": "the duck"}]
    given = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    assert isinstance(given, BatchEncoding)
    settings = {"max_new_tokens": 5, "pad_token_id": 1}
    expected = models["judge"].generate(**given, **settings)
    for found in (
        model.generate(given, **settings),
        model.generate(input_ids=given, **settings),
        model.generate(input_ids=given, attention_mask=given["attention_mask"], **settings),
        model.generate(inputs=given, **settings),
    ):
        assert torch.equal(found, expected)
    with torch.no_grad():
        logits = models["judge"](**given).logits
        for output in (model(given), model(input_ids=given), model(given, attention_mask=given["attention_mask"])):
            torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-4)
    padded = BatchEncoding(PROMPTS)
    assert torch.equal(model.generate(padded, **settings), models["judge"].generate(**padded, **settings))
    with pytest.raises(TypeError, match="input_ids as a tensor, got list; tokenize with return_tensors='pt'"):
        model.generate(model.tokenizer(["the duck"]))
    with pytest.raises(TypeError, match="its fields are text"):
        model({"text": "the duck"})


@both
def test_stop_strings_end_across_the_borders_of_tokens(models, backend):
    """A stop string of two characters, each a token of its own."""
    model, judge, tokenizer = models[backend], models["judge"], models[backend].tokenizer
    whole = judge.generate(**ONE, max_new_tokens=20, eos_token_id=None)[0, 14:]
    printable = (whole[2:19] < 96) & (whole[3:20] < 96) & (whole[2:19] > 1) & (whole[3:20] > 1)
    place = 2 + int(printable.nonzero()[0])
    stop = tokenizer.decode(whole[place : place + 2])
    for settings in ({}, {"num_beams": 1, "output_scores": True, "return_dict_in_generate": True, "min_new_tokens": 2}):
        settings = {"max_new_tokens": 20, "eos_token_id": None, "stop_strings": [stop, "no such"]} | settings
        ours, theirs = (answered(m, tokenizer, settings | {"one": True}) for m in (model, judge))
        assert torch.equal(ours, theirs) and ours.shape[1] == 14 + place + 2 < 14 + 20
    # The model's own tokenizer serves where none is given.
    assert torch.equal(model.generate(**ONE, max_new_tokens=20, eos_token_id=None, stop_strings=stop), ours)


@both
def test_characters_of_several_tokens_are_streamed_whole(models, backend, monkeypatch, capsys):
    """Emoji, CJK and combining characters, in transformers' streamers, one of them read from another thread."""
    model, tokenizer = models[backend], models[backend].tokenizer
    text = "añ→🦆! 日本語 e\u0301 👩‍🚀"
    script = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("jaxsloth.frontend.decoding.tokens_of", lambda *_: (np.array([token]) for token in [*script, 1]))
    settings: dict[str, Any] = {"max_new_tokens": len(script) + 1, "do_sample": True}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**ONE, **settings, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and len(pieces) > 3
    model.generate(**ONE, **settings, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == text + "\n"


class Interrupts(BaseStreamer):
    """Ctrl-C after the prompt and two tokens."""

    def __init__(self):
        self.count = 0

    def put(self, value):
        self.count += 1
        if self.count == 3:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("the answer was interrupted")


@both
def test_ctrl_c_between_tokens_leaves_the_model_usable(models, backend):
    model = models[backend]
    expected = models["judge"].generate(**PROMPTS, pad_token_id=1)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**PROMPTS, pad_token_id=1, streamer=Interrupts())
    assert torch.equal(model.generate(**PROMPTS, pad_token_id=1), expected)


@both
def test_prompts_that_are_empty_padded_on_the_right_or_longer_than_the_positions(models, backend):
    model, judge = models[backend], models["judge"]
    with pytest.raises(ValueError, match=r"at least one token, got \(1, 0\)"):
        model.generate(input_ids=torch.zeros((1, 0), dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[]])
    right = {name: value[:2, :14] for name, value in batch((14, 9)).items() if name != "labels"}
    long = {"input_ids": torch.randint(2, 200, (1, 300), generator=torch.Generator().manual_seed(0))}
    for prompts in (right, long):
        settings = {"max_new_tokens": 3, "pad_token_id": 1}
        assert torch.equal(model.generate(**prompts, **settings), judge.generate(**prompts, **settings))


@both
def test_generation_config_json_is_read(folder, models, backend, tmp_path):
    """Its list of ends and its sampling defaults, by every door; what the call says counts more."""
    whole = models["judge"].generate(**ONE)[0, 14:].tolist()
    own = tmp_path / "instruct"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).symlink_to(file)
    fields = {"eos_token_id": [1, whole[6]], "do_sample": True, "top_k": 1, "temperature": 0.7, "pad_token_id": 1}
    (own / "generation_config.json").write_text(json.dumps(fields), encoding="utf-8")
    model, judge = loaded(own, backend), AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32)
    first = whole.index(whole[6])
    for settings in ({}, {"eos_token_id": [whole[3]]}, {"do_sample": False, "max_new_tokens": 12}, {"num_beams": 2}):
        torch.manual_seed(0)
        expected = judge.generate(**ONE, **settings)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**ONE, **settings), expected), settings
    assert model.generate(**ONE).shape[1] == 14 + first + 1
    assert model.engine.model.spec.eos_ids == (1, whole[6])
    assert model.generate(ONE["input_ids"].tolist(), max_new_tokens=12) == [whole[:first]]
    assert model.generate(ONE["input_ids"].tolist(), max_new_tokens=12, eos_ids=(whole[3],)) == [whole[: whole.index(whole[3])]]
    # A merged folder ends and samples as its base does.
    merged = tmp_path / "merged"
    model.save_pretrained_merged(str(merged))
    again = GenerationConfig.from_pretrained(merged)
    assert (again.eos_token_id, again.do_sample, again.top_k) == ([1, whole[6]], True, 1)
    answer = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).generate(**ONE)
    assert answer.shape[1] == 14 + first + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "generation_config.json must hold an object of keys and values, got a list"),
        ("{", "generation_config.json"),
        ('{"eos_token_id": "end"}', "generation_config.json: eos_token_id must be a token id or a list of them, got 'end'"),
        ('{"eos_token_id": [1, 260]}', r"generation_config.json: eos_token_id must be below vocab_size \(260\), got 260"),
        ('{"temperature": "hot"}', "generation_config.json: temperature must be a valid number, got 'hot'"),
        ('{"max_new_tokens": -1}', "generation_config.json can't be taken: .*max_new_tokens"),
    ],
)
def test_a_wrong_generation_config_names_its_file(folder, tmp_path, text, message):
    own = Path(tmp_path) / "wrong"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).symlink_to(file)
    (own / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        loaded(own, "torch")
