"""What trainers take as data sets: streams without an end, and what is no data set, on both trainers and backends."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pandas
import pytest
import trl
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from jaxsloth import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from jaxsloth.data.errors import DataError
from jaxsloth.frontend.dpo_data import encode_pairs
from jaxsloth.frontend.sft_data import encode
from tests.support.modules import BACKENDS, TRAINING, their_base
from tests.support.native import logged, native_model, under_their_peft
from tests.support.tiny import WORDS, byte_tokenizer, write_checkpoint

SETTINGS: dict[str, Any] = TRAINING | {"max_steps": 4, "learning_rate": 5e-3, "max_length": 64}
read: list[int] = []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("rows") / "model"))


def endless():
    """Every third row is an empty text, which TRL keeps: its end of sequence alone."""
    for number in itertools.count():
        read.append(number)
        yield {"text": "" if number % 3 == 1 else f"{number} {' '.join(WORDS[: 2 + number % 7])}"}


@pytest.fixture(scope="module")
def judged(checkpoint, tmp_path_factory):
    ours, tokenizer = native_model(checkpoint, "torch")
    changes = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "gradient_accumulation_steps": 2}
    trainer = trl.SFTTrainer(
        under_their_peft(ours, their_base()),
        args=trl.SFTConfig(output_dir=str(tmp_path_factory.mktemp("judge")), **SETTINGS | changes),
        train_dataset=IterableDataset.from_generator(endless),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_without_an_end_is_read_as_far_as_max_steps_needs(checkpoint, tmp_path, judged, backend):
    model, tokenizer = native_model(checkpoint, backend)
    config = SFTConfig(str(tmp_path), **SETTINGS, gradient_accumulation_steps=2)
    read.clear()
    trainer = SFTTrainer(model, args=config, train_dataset=IterableDataset.from_generator(endless), processing_class=tokenizer)
    assert len(trainer.examples) == 4 * 2 * 2 and max(read) <= 16
    trainer.train()
    history = trainer.state.log_history
    assert np.abs(logged(history, "loss") - logged(judged, "loss")).max() < 1e-5
    for name in ("epoch", "num_tokens"):
        assert logged(history, name) == pytest.approx(logged(judged, name), rel=1e-9)


def made(checkpoint, folder, rows, **changes):
    model, tokenizer = native_model(checkpoint, "torch")
    return SFTTrainer(model, args=SFTConfig(str(folder), **SETTINGS | changes), train_dataset=rows, processing_class=tokenizer)


def test_streams_that_are_packed_and_of_preferences_end_too(checkpoint, tmp_path):
    packed = made(checkpoint, tmp_path, IterableDataset.from_generator(endless), packing=True)
    assert packed._step_batches().steps_per_epoch >= 4
    model, tokenizer = native_model(checkpoint, "torch")
    pairs = ({"prompt": f"{n} ", "chosen": "duck", "rejected": "egg"} for n in itertools.count())
    config = DPOConfig(str(tmp_path), **SETTINGS)
    trainer = DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    assert len(trainer.examples) == 2 * 4 * 2


def test_a_stream_needs_max_steps(checkpoint, tmp_path):
    for rows in (IterableDataset.from_generator(endless), endless()):
        with pytest.raises(ValueError, match=r"train_dataset has no length .* max_steps must say .*, got max_steps=-1"):
            made(checkpoint, tmp_path, rows, max_steps=-1)


ROWS = [{"text": "the duck lays eggs"}] * 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            DatasetDict({"train": Dataset.from_list(ROWS)}),
            r"got a DatasetDict of train; pass one of them, as .*dataset\['train'\]",
        ),
        (
            IterableDatasetDict({"train": IterableDataset.from_generator(endless)}),
            "got a IterableDatasetDict of train; pass one",
        ),
        ({"a": ROWS, "b": ROWS}, "must be one data set, got a dict of a, b; pass one of them"),
        ("rows.jsonl", r"got the text 'rows.jsonl'; pass datasets.load_dataset"),
        (pandas.DataFrame(ROWS), r"got a table of pandas; pass datasets.Dataset.from_pandas"),
        (5, "must be a data set or a list of rows, got int"),
        ([], "has no rows"),
        (["the duck"], r"row 0 \(counted from 0\) must be a dict of fields, got str"),
        ([*ROWS, {"text": None}], r"row 4 \(counted from 0\): a text must be a string"),
        ([*ROWS, {"text": "cut \ud83d"}], r"row 4 \(counted from 0\): a text must be of whole characters, got the lone"),
        ([{"words": "the duck"}], "has no field 'text'.*its fields are: words"),
    ],
)
def test_what_is_no_data_set_says_what_to_pass(checkpoint, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        made(checkpoint, tmp_path, rows)


def test_nothing_reports_where_report_to_is_none(checkpoint, tmp_path):
    assert made(checkpoint, tmp_path, ROWS, report_to=None).args.report_to == []


# Reads parts of text, as the templates of models that see images do; and one that takes texts alone, as most.
PARTS = (
    "{% if tools %}tools:{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "lay", "description": "lays", "parameters": {"type": "object"}}}]


def text_parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


CHAT = [{"role": "user", "content": text_parts("the ", "duck")}, {"role": "assistant", "content": text_parts("lays ", "eggs")}]


@pytest.mark.parametrize("tools", [None, TOOLS, json.dumps(TOOLS)], ids=["none", "list", "json"])
def test_parts_of_text_and_tools_are_rendered_as_the_template_does(tools):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PARTS
    row = {"messages": CHAT, "tools": tools}
    expected = tokenizer.apply_chat_template(CHAT, tools=TOOLS if tools else None, tokenize=False)
    [example] = encode([row], tokenizer, SFTConfig("unused"), None, None, 260, "rows")
    assert tokenizer.decode(example.tokens) == expected and "<lays ><eggs>" in expected
    assert ("tools:" in expected) == bool(tools)
    [answers] = encode([row], tokenizer, SFTConfig("unused", assistant_only_loss=True), None, None, 260, "rows")
    assert tokenizer.decode(answers.tokens[answers.learn]) == "<lays ><eggs><eos>"
    pair = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "none"}], "tools": tools}
    (chosen, _), _ = encode_pairs([pair], tokenizer, DPOConfig("unused"), None, 260, "rows")
    assert tokenizer.decode(chosen.tokens) == expected


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"]
)
def test_a_template_of_texts_alone_gets_parts_joined(template):
    """The first fails on a list, the second would write how Python shows it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    [example] = encode([{"messages": CHAT}], tokenizer, SFTConfig("unused"), None, None, 260, "rows")
    assert tokenizer.decode(example.tokens) == "u:the duck<eos>a:lays eggs<eos>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\] must be a part of text"),
        ({"messages": CHAT, "tools": "{"}, "tools must be a list of functions or its JSON"),
        ({"messages": CHAT, "tools": {"name": "lay"}}, "tools must be a list of functions"),
    ],
)
def test_wrong_parts_and_tools(row, message):
    with pytest.raises(DataError, match=message):
        encode([row], byte_tokenizer(), SFTConfig("unused"), None, None, 260, "rows")
