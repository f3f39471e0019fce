"""get_chat_template: names, renamed keys, system messages, and which token ends an answer."""

from __future__ import annotations

import copy

import pytest
from transformers import AutoTokenizer

from jaxsloth.chat_templates import get_chat_template
from jaxsloth.data.catalogue import TEMPLATES
from jaxsloth.data.errors import DataError
from tests.data.test_encoding import CHATML
from tests.support.real_tokenizers import llama3, qwen
from tests.support.tiny import byte_tokenizer

SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
TURNS = [{"role": "user", "content": "Hi é😀"}, {"role": "assistant", "content": "Hello"}]
THEIRS = [{"from": "human", "value": "Hi é😀"}, {"from": "gpt", "value": "Hello"}]


def text(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renamed_keys_and_speakers_write_the_same_text(name):
    plain = get_chat_template(byte_tokenizer(), chat_template=name)
    renamed = get_chat_template(byte_tokenizer(), chat_template=name, mapping=SHAREGPT)
    expected = text(plain, TURNS)
    assert "Hi é😀" in expected and "Hello" in expected
    assert text(renamed, THEIRS) == expected
    assert text(renamed, TURNS) == expected, "rows that were standardized since are read too"
    masks = renamed.apply_chat_template(THEIRS, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, learn in zip(masks["input_ids"], masks["assistant_masks"], strict=True) if learn]
    assert "Hello" in renamed.decode(learnt) and "Hi" not in renamed.decode(learnt)


def test_a_message_without_the_renamed_key_is_refused():
    tokenizer = get_chat_template(byte_tokenizer(), mapping=SHAREGPT)
    with pytest.raises(Exception, match="a message must have the key from, and it has: speaker, text"):
        text(tokenizer, [{"speaker": "human", "text": "Hi"}])
    with pytest.raises(DataError, match="mapping renames role, content, user, assistant, got 'system'"):
        get_chat_template(byte_tokenizer(), mapping={"system": "sys"})


@pytest.mark.parametrize("name", [name for name, known in TEMPLATES.items() if "system" in known.roles])
def test_a_system_message_of_ones_own(name):
    said = 'Say "no" {{ or }} {% yes %} \\n é😀.\nBriefly'
    given = get_chat_template(byte_tokenizer(), chat_template=name, system_message=said)
    plain = get_chat_template(byte_tokenizer(), chat_template=name)
    assert text(given, TURNS) == text(plain, [{"role": "system", "content": said}, *TURNS])
    other = [{"role": "system", "content": "Shout."}, *TURNS]
    assert text(given, other) == text(plain, other)


def test_a_system_message_that_would_be_dropped_is_refused():
    with pytest.raises(DataError, match="template 'gemma' writes no system message"):
        get_chat_template(byte_tokenizer(), chat_template="gemma", system_message="Be brief.")
    deaf = CHATML.replace("in messages %}", "in messages if message.role != 'system' %}")
    with pytest.raises(DataError, match="the chat template drops the system message"):
        get_chat_template(byte_tokenizer(), chat_template=deaf, system_message="Be brief.")


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_jinja_text_that_drops_a_role_is_refused(role):
    drops = CHATML.replace("in messages %}", "in messages if message.role != '" + role + "' %}")
    tokenizer = byte_tokenizer()
    before = tokenizer.chat_template
    with pytest.raises(DataError, match=f"drops the role '{role}'"):
        get_chat_template(tokenizer, chat_template=(drops, "<|im_end|>"))
    assert tokenizer.chat_template == before


def test_the_vocabularys_own_token_becomes_eos():
    for made, name, stop, number in ((llama3, "llama-3.1", "<|eot_id|>", 128009), (qwen, "qwen-2.5", "<|im_end|>", 151645)):
        tokenizer = copy.deepcopy(made())
        before, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        assert get_chat_template(tokenizer, chat_template=name, map_eos_token=False).eos_token_id == before != number
        assert get_chat_template(tokenizer, chat_template=name) is tokenizer
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == (stop, number)
        assert tokenizer.pad_token_id == padding and len(tokenizer) == len(made())


@pytest.mark.parametrize("template", ["chatml", (CHATML, "<|im_end|>")])
def test_a_token_that_the_vocabulary_lacks_takes_the_place_of_eos(template, tmp_path):
    tokenizer = get_chat_template(byte_tokenizer(), chat_template=template)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 1, 1)
    assert len(tokenizer) == len(byte_tokenizer()) and "<eos>" not in tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(str(tmp_path))):
        ids = one.apply_chat_template(TURNS)["input_ids"]
        assert ids.count(1) == 2 and one.decode([1]) == "<|im_end|>"
        assert text(one, TURNS) == text(tokenizer, TURNS)
        assert one.decode(ids, skip_special_tokens=True).count("<|im_end|>") == 0


def test_a_real_tokenizers_eos_is_renamed_and_saved(smollm2, tmp_path):
    before = smollm2.eos_token_id
    ids = smollm2("Ducks lay eggs.")["input_ids"]
    get_chat_template(smollm2, chat_template="gemma-3").save_pretrained(tmp_path)
    for one in (smollm2, AutoTokenizer.from_pretrained(str(tmp_path))):
        assert (one.eos_token, one.eos_token_id) == ("<end_of_turn>", before)
        assert one("<end_of_turn>")["input_ids"] == [before] and one("Ducks lay eggs.")["input_ids"] == ids


def test_without_mapping_a_missing_token_is_warned_of():
    with pytest.warns(UserWarning, match="has no <\\|im_end\\|> token.*map_eos_token=True"):
        tokenizer = get_chat_template(byte_tokenizer(), map_eos_token=False)
    assert tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize(
    "template", [(CHATML.replace("<|im_end|>", "</s>"), "eos_token"), "{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_a_jinja_text_that_ends_in_eos_changes_no_token(template):
    tokenizer = get_chat_template(byte_tokenizer(), chat_template=template)
    assert tokenizer.eos_token == "<eos>" and "Hello" in text(tokenizer, TURNS)


@pytest.mark.parametrize(
    ("template", "message"),
    [("chatlm", "did you mean 'chatml'"), (("chatml",), "must be \\(Jinja text, EOS token\\)"), (None, "must be a name")],
)
def test_what_is_no_template(template, message):
    with pytest.raises(DataError, match=message):
        get_chat_template(byte_tokenizer(), chat_template=template)
