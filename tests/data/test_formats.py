"""Each format's rows, and the errors of rows that don't fit."""

import numpy as np
import pytest

from jaxsloth.batch import IGNORE
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import Conversation, Text, Tokens, row_reader
from jaxsloth.recipe import DataRecipe

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(row, **fields):
    return row_reader(DataRecipe(path="unused", **fields), row)(row)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": PAIR, "text": "not this"}, {}),
        ({"messages": [{**m, "name": None, "tool_calls": None} for m in PAIR]}, {}),
        ({"chat": PAIR}, {"columns": {"messages": "chat"}}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}),
        ({"conversations": PAIR}, {"format": "messages"}),
        ({"instruction": "q", "input": "", "output": "a"}, {}),
        ({"instruction": "q", "output": "a"}, {"format": "alpaca"}),
    ],
)
def test_conversations(row, fields):
    assert read(row, **fields) == Conversation(PAIR)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"prompt": "q", "completion": "a"}, {}),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, {}),
        ({"question": "q", "answer": "a", "prompt": "shadowed"}, {"columns": {"prompt": "question", "completion": "answer"}}),
    ],
)
def test_prompt_and_completion(row, fields):
    assert read(row, **fields) == Conversation(PAIR, first_learnt=1)


def test_alpaca_input_follows_the_instruction():
    conversation = read({"instruction": "Sum up.", "input": "Long text.", "output": "Short."})
    assert conversation.messages[0]["content"] == "Sum up.\n\nLong text."


def test_text():
    assert read({"text": "a", "label": 1}) == Text("a")


def test_tokens():
    content = read({"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]})
    assert isinstance(content, Tokens)
    assert content.tokens.dtype == np.int32
    assert content.tokens.tolist() == [5, 6, 7]
    assert content.learn.tolist() == [False, True, True]
    assert read({"input_ids": [5, 6]}).learn.tolist() == [True, True]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"question": "q", "answer": "a"}, {}, r"no format fits a row with the fields question, answer; expected one of: .*"),
        (
            {"prompt": "q", "answer": "a"},
            {"format": "prompt_completion"},
            r"expects the fields prompt, completion, and completion is missing; the row has prompt, answer\..*completion: <",
        ),
        ({"text": None}, {"format": "text"}, "text is missing"),
        ({"text": "a"}, {"columns": {"text": "body"}}, r"text is the file's field 'body', and the first row has text"),
        ({"text": "a"}, {"columns": {"question": "text"}}, "no format expects 'question'; expected fields are input_ids, "),
        ({"messages": "hello"}, {}, "messages must be a list of messages with role and content, got str 'hello'"),
        ({"messages": []}, {}, "messages must be a list"),
        ({"messages": [{"content": "a"}]}, {}, r"messages\[0\] must be a message with role"),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            {},
            r"messages\[0\].content\[0\] must be a part of text, .*, got str 'a'",
        ),
        ({"text": 3}, {}, "text must be text, got int 3"),
        ({"input_ids": [1, 2], "labels": [1]}, {}, "got 1 labels and 2 input_ids"),
        ({"input_ids": [1, 2], "labels": [2, IGNORE]}, {}, "labels are not shifted"),
        ({"input_ids": [1, -2]}, {}, "must not be negative, got -2"),
        ({"input_ids": [1.5]}, {}, "must be a list of integers"),
        ({"input_ids": [[1]]}, {}, "must be a list of integers"),
    ],
)
def test_wrong_rows(row, fields, message):
    with pytest.raises(DataError, match=message):
        read(row, **fields)
