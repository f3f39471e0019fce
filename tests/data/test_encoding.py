"""What is learnt, against TRL's and transformers' own tokenization."""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from jaxsloth.batch import IGNORE
from jaxsloth.data.encode import encode_rows
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import Conversation
from jaxsloth.data.templates import ChatTemplate, tokenize_spans
from jaxsloth.recipe import DataRecipe

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many eggs?"},
    {"role": "assistant", "content": "Sixteen.\n\nA day."},
    {"role": "user", "content": " And why is the sky blue? é😀"},
    {"role": "assistant", "content": "Because of light 😀 \n"},
]


def recipe(**fields):
    return DataRecipe(**{"path": "unused", "max_length": 1024, **fields})


def trl_examples(rows, tokenizer, folder, **options):
    """input_ids and labels as TRL's SFTTrainer makes them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    arguments = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **options)
    trainer = SFTTrainer(
        LlamaForCausalLM(small), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    prepared: Any = trainer.train_dataset
    batches = [trainer.data_collator([row]) for row in prepared]
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


def ours(rows, tokenizer, **fields):
    return [
        (example.tokens.tolist(), np.where(example.learn, example.tokens, IGNORE).tolist())
        for example in encode_rows(rows, tokenizer, recipe(**fields))
    ]


@pytest.mark.parametrize("max_length", [1024, 200])
def test_prompt_and_completion_like_trl(smollm2, gsm8k, tmp_path, max_length):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in gsm8k
    ]
    expected = trl_examples(rows, smollm2, tmp_path, max_length=max_length)
    columns = {"prompt": "question", "completion": "answer"}
    assert ours(gsm8k, smollm2, columns=columns, max_length=max_length, truncation=True) == expected
    assert ours(rows, smollm2, max_length=max_length, truncation=True) == expected
    learnt = [label for label in expected[0][1] if label != IGNORE]
    assert max_length == 200 or smollm2.eos_token_id in learnt, "EOS is padding here, and must be learnt all the same"


def test_a_token_across_the_border_is_learnt_like_trl(smollm2, tmp_path):
    # The header's line break and the answer's leading spaces are one token.
    turns = {"prompt": CHAT[1:2], "completion": [{"role": "assistant", "content": "  Sixteen."}]}
    encoded = ours([turns], smollm2)
    assert encoded == trl_examples([turns], smollm2, tmp_path, max_length=1024)
    assert smollm2.decode([label for label in encoded[0][1] if label != IGNORE]) == "\n  Sixteen.<|im_end|>\n"


def test_text_like_trl(smollm2, gsm8k, tmp_path):
    rows = [{"text": row["answer"]} for row in gsm8k[:5]]
    assert ours(rows, smollm2) == trl_examples(rows, smollm2, tmp_path, max_length=1024)


def test_whole_conversations_like_trl(smollm2, tmp_path):
    rows = [{"messages": CHAT}]
    assert ours(rows, smollm2, response_only=False) == trl_examples(rows, smollm2, tmp_path, max_length=1024)


def with_tags(template):
    """ChatML whose answers are inside generation tags, header left out: transformers then says what is learnt."""
    content = "message['content'] + '<|im_end|>\n'"
    tagged = (
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}{{ CONTENT }}"
        "{% endgeneration %}{% else %}{{ CONTENT }}{% endif %}"
    ).replace("CONTENT", content)
    whole = "{{ '<|im_start|>' + message['role'] + '\n' + " + content + " }}"
    assert whole in template
    return template.replace(whole, tagged)


def test_answers_like_transformers_generation_mask(smollm2):
    template = with_tags(CHATML)
    judged = smollm2.apply_chat_template(CHAT, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    for ours_template in ("chatml", template):
        tokens, learn = ChatTemplate(smollm2, ours_template).encode(Conversation(CHAT))
        assert tokens.tolist() == judged["input_ids"]
        assert learn.astype(int).tolist() == judged["assistant_masks"]
    assert smollm2.decode(tokens[learn]) == "".join(m["content"] + "<|im_end|>\n" for m in CHAT if m["role"] == "assistant")


def test_only_the_completion_is_learnt_of_a_conversation(smollm2):
    for template in ("chatml", with_tags(CHATML)):
        tokens, learn = ChatTemplate(smollm2, template).encode(Conversation(CHAT, first_learnt=3))
        assert smollm2.decode(tokens[learn]) == CHAT[4]["content"] + "<|im_end|>\n"


def test_trimmed_offsets_and_no_double_bos(tiny, headers_template):
    tokens, learn = ChatTemplate(tiny, headers_template).encode(Conversation(CHAT))
    assert tokens.tolist().count(tiny.bos_token_id) == 1
    assert tokens.tolist() == tiny.apply_chat_template(CHAT, chat_template=headers_template)["input_ids"]
    assert tiny.decode(tokens[learn]) == "Sixteen.\n\nA day.<|eot|>Because of light 😀<|eot|>"
    assert not learn[:-1][tokens[:-1] == tiny.convert_tokens_to_ids("<|end|>")].any()


def test_text_gets_one_bos_and_one_eos(tiny):
    for text in ("eggs", "<bos>eggs", "<bos>eggs<eos>"):
        (example,) = encode_rows([{"text": text}], tiny, recipe())
        assert tiny.decode(example.tokens) == "<bos>eggs<eos>"


def test_spaces_at_the_borders(tiny):
    # With trimmed offsets a space is the empty range at its own end: the header's isn't learnt, the answer's is.
    text = "<|end|> \neggs <|start|>user"
    answer = text.index("eggs"), text.index("<|start|>")
    tokens, learn = tokenize_spans(tiny, text, [answer])
    assert tiny.decode(tokens[learn]) == "eggs "


def test_tokenizer_without_offsets(smollm2):
    class Slow:
        is_fast = False

        def __call__(self, text, add_special_tokens):
            return smollm2(text, add_special_tokens=add_special_tokens)

    text = ChatTemplate(smollm2, "chatml").render(CHAT)
    spans = [(text.index("Sixteen"), text.index("<|im_start|>user\n And"))]
    for fast, slow in zip(tokenize_spans(smollm2, text, spans), tokenize_spans(Slow(), text, spans), strict=True):
        assert fast.tolist() == slow.tolist()


def test_template_without_answer_header(tiny):
    template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|> ' + m['content'] + '<|eot|>' }}{% endfor %}"  # no header
    )
    tokens, learn = ChatTemplate(tiny, template).encode(Conversation(CHAT))
    expected = "".join(m["content"] + "<|eot|>" for m in CHAT if m["role"] == "assistant")
    assert tiny.decode(tokens[learn]).replace(" ", "") == expected.replace(" ", "")


def test_templates_that_cannot_be_used(tiny):
    rewrites = "{% for m in messages %}{{ m['role'] + ('!' if loop.last else '') + m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"can't be split into prompts and answers.*chatml"):
        ChatTemplate(tiny, rewrites).encode(Conversation(CHAT))
    with pytest.raises(DataError, match=r"no chat template.*'chatml'"):
        ChatTemplate(tiny)
    with pytest.raises(DataError, match=r"one of llama-3, .*, got 'lama-3'; did you mean 'llama-3'\?"):
        ChatTemplate(tiny, "lama-3")
    with pytest.raises(DataError, match=r"row 1 .*refuses the conversation: no system"):
        refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
        encode_rows([{"messages": CHAT[1:]}, {"messages": CHAT}], tiny, recipe(template=refusing))


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_template_that_drops_a_role_is_refused(smollm2, role):
    drops = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != '" + role + "' %}")
    with pytest.raises(DataError, match=f"row 0 .*the chat template drops the role '{role}'"):
        encode_rows([{"messages": CHAT}], smollm2, recipe(template=drops))
    others = {"user": CHAT[:1] + CHAT[2:3], "system": CHAT[1:3]}.get(role)
    if others is not None:
        assert len(encode_rows([{"messages": others}], smollm2, recipe(template=drops))) == 1


def test_system_message_is_put_first(smollm2):
    rows = [{"messages": CHAT[1:]}, {"messages": CHAT}]
    first, second = encode_rows(rows, smollm2, recipe(template="chatml", system="Be brief."))
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.learn.tolist() == second.learn.tolist()
    pair = [{"prompt": "How many eggs?", "completion": "Sixteen."}]
    (one,) = encode_rows(pair, smollm2, recipe(template="chatml", system="Be brief."))
    assert smollm2.decode(one.tokens[one.learn]) == "Sixteen.<|im_end|>\n"


def test_long_rows(tiny):
    rows = [{"text": "eggs " * count} for count in (2, 300, 3, 400)]
    lengths = [len(e.tokens) for e in encode_rows(rows, tiny, recipe())]
    with pytest.raises(DataError) as error:
        encode_rows(rows, tiny, recipe(max_length=20))
    text = str(error.value)
    assert f"2 of 4 rows are longer than data.max_length=20: row 1 ({lengths[1]} tokens), row 3 ({lengths[3]} tokens)" in text
    assert f"Set data.max_length to {lengths[3]}, or data.truncation to true" in text
    cut = encode_rows(rows, tiny, recipe(max_length=20, truncation=True))
    assert [len(e.tokens) for e in cut] == [lengths[0], 20, lengths[2], 20]


def test_rows_without_anything_to_learn(tiny):
    rows = [{"prompt": "eggs " * count, "completion": "day"} for count in (2, 100, 2, 90)]
    with pytest.raises(DataError, match=r"2 of 4 rows have all labels masked.*max_length=64: rows 1, 3\."):
        encode_rows(rows, tiny, recipe(template="chatml", max_length=64, truncation=True))
    with pytest.raises(DataError, match=r"1 of 1 rows have all labels masked.*rows 0\."):
        encode_rows([{"messages": CHAT[:2]}], tiny, recipe(template="chatml"))
    with pytest.raises(DataError, match=r"rows 0\."):  # nothing is before the first token, so it can't be learnt
        encode_rows([{"input_ids": [5, 6], "labels": [5, IGNORE]}], tiny, recipe())


@pytest.mark.parametrize("row", [{"text": "cut \ud83d"}, {"messages": [{"role": "user", "content": "cut \ud83d"}, CHAT[2]]}])
def test_halves_of_characters_are_named(tiny, row):
    for only_answers in (True, False):
        with pytest.raises(DataError, match=r"row 0 \(counted from 0\): .*the lone surrogate '\\ud83d' at \d+"):
            encode_rows([row], tiny, recipe(template="chatml", response_only=only_answers))


def test_a_row_without_a_mapped_field_does_not_take_another(tiny):
    rows = [{"question": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    with pytest.raises(DataError, match=r"row 1 .*expects the fields prompt, completion, and prompt is missing"):
        encode_rows(rows, tiny, recipe(template="chatml", columns={"prompt": "question", "completion": "answer"}))


def test_tokens_outside_the_vocabulary(tiny):
    with pytest.raises(DataError, match=r"1 of 2 rows hold tokens.*largest id 70, vocabulary of 60\): rows 1\."):
        encode_rows([{"input_ids": [1, 2]}, {"input_ids": [3, 70]}], tiny, recipe(), vocab_size=60)


def test_chatml_warns_without_its_tokens(tiny):
    class Without:
        def get_vocab(self):
            return {}

    with pytest.warns(UserWarning, match="no <|im_end|> token"):
        ChatTemplate(Without(), "chatml")
