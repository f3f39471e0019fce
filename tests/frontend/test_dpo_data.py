"""Preference rows: the tokens and masks of TRL's trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trl
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from jaxsloth.data.errors import DataError
from jaxsloth.frontend.dpo_config import DPOConfig
from jaxsloth.frontend.dpo_data import encode_pairs
from jaxsloth.frontend.sft_config import SFTConfig
from jaxsloth.frontend.sft_data import encode
from tests.data.conftest import HEADERS, tiny_tokenizer
from tests.support.tiny import WORDS, byte_tokenizer

VOCAB = 400
ENDS = ("the ducks", " the ducks lay", "ducks<eos>")


def texts(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": f"How many eggs {n}?" + " " * (n % 2), "chosen": ENDS[n % 3] + " lay" * n, "rejected": ENDS[(n + 1) % 3]}
        for n in range(count)
    ]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations(count: int = 12) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        before = [said("system", "be brief")] * (n % 2) + [said("user", f"say {WORDS[n]}")]
        if n % 3 == 0:
            before += [said("assistant", "them"), said("user", "again")]
        answers = [[said("assistant", " ".join(WORDS[n % 4 : n % 4 + size]))] for size in (2 + n % 5, 3)]
        rows.append({"prompt": before, "chosen": answers[0], "rejected": answers[1]})
    return rows


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


DATA = {
    "texts": texts(),
    "implicit texts": implicit(texts()),
    "messages": conversations(),
    "implicit messages": implicit(conversations()),
}
LENGTHS: list[dict[str, Any]] = [
    {"max_length": None},
    {"max_length": 24},
    {"max_length": 24, "truncation_mode": "keep_end"},
]


def bpe_tokenizer() -> Any:
    """Merges across the border of prompt and answer; texts get BOS from the tokenizer, conversations from the template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HEADERS
    return tokenizer


def theirs(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> dict[str, list[list[int]]]:
    """TRL's padded batch of all rows, read back: tokens and completion masks, chosen before rejected."""
    config = trl.DPOConfig("unused", bf16=False, use_cpu=True, **settings)
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer._tokenizer = tokenizer
    prepared = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, config, "train")
    collate = DataCollatorForPreference(tokenizer.pad_token_id, config.max_length, config.truncation_mode)
    batch = collate([dict(row) for row in prepared])
    real = batch["attention_mask"].bool()
    columns = ("input_ids", "completion_mask")
    return {name: [row[kept].tolist() for row, kept in zip(batch[name], real, strict=True)] for name in columns}


def ours(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> list[Any]:
    config = DPOConfig("unused", **settings)
    return encode_pairs(Dataset.from_list(rows), tokenizer, config, config.max_length, VOCAB, "train_dataset")[0]


HEADER = "{{ '<|start|>' + ROLE + (' (' + mood + ')' if mood is defined else '') + '<|end|>' }}"
VARIABLE = (
    "{% for message in messages %}"
    + HEADER.replace("ROLE", "message['role']")
    + "{{ message['content'] + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
    + HEADER.replace("ROLE", "'assistant'")
    + "{% endif %}"
)


def test_templates_get_the_rows_variables():
    """As TRL renders them: a column chat_template_kwargs."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = VARIABLE
    moods = [{"chat_template_kwargs": {"mood": ("calm", "eager")[n % 2]}} for n in range(6)]
    for rows in (conversations(6), implicit(conversations(6))):
        given = [row | mood for row, mood in zip(rows, moods, strict=True)]
        judge, examples = theirs(given, tokenizer, max_length=None), ours(given, tokenizer, max_length=None)
        in_their_order = [*examples[0::2], *examples[1::2]]
        assert [example.tokens.tolist() for example in in_their_order] == judge["input_ids"]
        assert [example.learn.astype(int).tolist() for example in in_their_order] == judge["completion_mask"]
        assert "eager" in tokenizer.decode(examples[2].tokens) and "eager" not in tokenizer.decode(examples[0].tokens)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion", "answers"])
def test_supervised_rows_get_them_too(kind):
    tokenizer = tiny_tokenizer()
    content = "{{ message['content'] }}"
    tagged = "{% if message['role'] == 'assistant' %}{% generation %}" + content + "{% endgeneration %}{% else %}"
    tokenizer.chat_template = VARIABLE.replace("{{ message['content'] +", tagged + content + "{% endif %}{{")
    question, answer = [said("user", "why")], [said("assistant", "the ducks lay")]
    both: dict[str, Any] = (
        {"messages": question + answer} if kind != "prompt_completion" else {"prompt": question, "completion": answer}
    )
    config = SFTConfig("unused", assistant_only_loss=kind == "answers")
    rows: list[dict[str, Any]] = [both | {"chat_template_kwargs": {"mood": mood}} for mood in ("calm", "eager")]
    for example, row in zip(encode(rows, tokenizer, config, None, None, VOCAB, "rows"), rows, strict=True):
        extra = dict(row["chat_template_kwargs"])
        expected: Any = tokenizer.apply_chat_template(
            question + answer, return_dict=True, return_assistant_tokens_mask=True, **extra
        )
        assert example.tokens.tolist() == expected["input_ids"]
        if kind == "answers":
            assert example.learn.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.filterwarnings("ignore:The `'keep_end'`")
@pytest.mark.parametrize("settings", LENGTHS, ids=str)
@pytest.mark.parametrize("make", [byte_tokenizer, bpe_tokenizer])
@pytest.mark.parametrize("data", DATA)
def test_tokens_are_trls(data, make, settings):
    judge = theirs(DATA[data], make(), **settings)
    examples = ours(DATA[data], make(), **settings)
    in_their_order = [*examples[0::2], *examples[1::2]]
    assert len(in_their_order) == len(judge["input_ids"]) >= 2
    assert [example.tokens.tolist() for example in in_their_order] == judge["input_ids"]
    assert [example.learn.astype(int).tolist() for example in in_their_order] == judge["completion_mask"]


def test_a_text_beside_whole_conversations_is_no_prompt():
    """As in ultrafeedback_binarized: the prompt is written out in both answers."""
    rows = [row | {"prompt": "say it"} for row in implicit(conversations())]
    examples = [ours(given, byte_tokenizer(), max_length=None) for given in (rows, conversations())]
    for one, other in zip(*examples, strict=True):
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.learn, other.learn)


def test_prompts_keep_their_last_tokens():
    whole, cut = (ours(texts(3), byte_tokenizer(), max_prompt_length=length) for length in (None, 5))
    for full, short in zip(whole, cut, strict=True):
        assert short.tokens.tolist() == full.tokens[-len(short.tokens) :].tolist()
        assert np.count_nonzero(~short.learn) == 5 and short.learn.sum() == full.learn.sum()


def test_references_of_the_data_set():
    rows = [row | {"ref_chosen_logps": -n - 0.5, "ref_rejected_logps": -n} for n, row in enumerate(texts(3))]
    for asked in (True, False):
        config = DPOConfig("unused", precompute_ref_log_probs=asked)
        examples, known = encode_pairs(rows, byte_tokenizer(), config, 512, VOCAB, "train_dataset")
        expected = [-0.5, 0, -1.5, -1, -2.5, -2]
        assert [known.get(example) for example in examples] == (expected if asked else [None] * 6)


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no rows": ([], "train_dataset has no rows"),
    "no answers": ([{"prompt": "a", "chosen": "b"}], "rejected is missing, and its fields are: prompt, chosen"),
    "kinds": ([{"prompt": "a", "chosen": "b", "rejected": [said("assistant", "c")]}], "row 0 .*must both be texts"),
    "prompt": ([{"prompt": [said("user", "a")], "chosen": "b", "rejected": "c"}], "row 0 .*prompt must be of the kind"),
    "nothing": ([{"prompt": [], "chosen": [], "rejected": []}], "row 0 .*must both be texts"),
    "tools": ([texts(1)[0] | {"tools": [{"name": "f"}]}], "row 0 .*the row has tools"),
    "variables": ([conversations(1)[0] | {"chat_template_kwargs": {"tokenize": True}}], "row 0 .*the template's own variables"),
    "no variables": ([conversations(1)[0] | {"chat_template_kwargs": "calm"}], "row 0 .*the template's own variables"),
    "length": ([{"prompt": "a" * 600, "chosen": "b", "rejected": "c"}], "no answer begins within max_length=512"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name):
    rows, message = BAD[name]
    with pytest.raises(DataError, match=message):
        encode_pairs(rows, byte_tokenizer(), DPOConfig("unused"), 512, VOCAB, "train_dataset")
    with pytest.raises(DataError, match=r"row 0 .*holds the token"):
        encode_pairs(texts(1), byte_tokenizer(), DPOConfig("unused"), 512, 20, "train_dataset")


def test_a_template_that_drops_a_role():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    rows = conversations(2)  # the second has a system message
    with pytest.raises(DataError, match=r"train_dataset, row 1 .*the chat template drops the role 'system'"):
        encode_pairs(rows, tokenizer, DPOConfig("unused"), 512, VOCAB, "train_dataset")
    for supervised in (
        [{"messages": row["prompt"] + row["chosen"]} for row in rows],
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows],
    ):
        with pytest.raises(DataError, match=r"train_dataset, row 1 .*the chat template drops the role 'system'"):
            encode(supervised, tokenizer, SFTConfig("unused"), None, None, VOCAB, "train_dataset")
