"""Data sets brought into the form that templates read."""

from __future__ import annotations

import inspect

import pytest
from datasets import Dataset, DatasetDict

from jaxsloth.chat_templates import standardize_data_formats, standardize_sharegpt, to_sharegpt
from jaxsloth.data.errors import DataError

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ALPACA = [
    {"instruction": f"Count {n}", "input": "" if n % 2 else f"{n} ducks", "output": f"{n} eggs", "id": n} for n in range(7)
]


def test_unsloths_names_and_defaults():
    known = {
        to_sharegpt: ("", "instruction", "output", True, 1, 3407),
        standardize_sharegpt: (None, ("system",), ("user", "human", "input"), ("gpt", "assistant", "output"), 1000, None),
    }
    for function, defaults in known.items():
        parameters = list(inspect.signature(function).parameters.values())
        assert tuple(parameter.default for parameter in parameters[1:]) == defaults
    assert list(inspect.signature(to_sharegpt).parameters)[1:4] == ["merged_prompt", "merged_column_name", "output_column_name"]


@pytest.mark.parametrize("column", ["conversations", "messages"])
@pytest.mark.parametrize("keys", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
def test_conversations_become_messages(column, keys):
    role, content, user, assistant = keys
    rows = [{column: [{role: user, content: "q"}, {role: assistant, content: "a"}], "id": n} for n in range(3)]
    rows[1][column] = [{role: "system", content: "s"}, *rows[1][column]]
    for function in (standardize_sharegpt, standardize_data_formats):
        done = function(Dataset.from_list(rows))
        assert done[0] == {column: PAIR, "id": 0}
        assert done[1][column] == [{"role": "system", "content": "s"}, *PAIR]
        assert function(done).to_list() == done.to_list(), "what is standard stays so"
    both = standardize_sharegpt(DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}))
    assert both["test"][0][column] == PAIR
    assert next(iter(standardize_sharegpt(Dataset.from_list(rows).to_iterable_dataset())))[column] == PAIR


def test_other_speakers_are_named_or_refused():
    rows = Dataset.from_list([{"conversations": [{"from": "Kunde", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    with pytest.raises(DataError, match=r"row 0, conversations\[0\]: the speaker 'Kunde' is none of .*aliases_for_user"):
        standardize_sharegpt(rows)
    assert standardize_sharegpt(rows, aliases_for_user=["Kunde"])[0]["conversations"] == PAIR
    with pytest.raises(DataError, match="must have the column conversations or messages, and it has: text"):
        standardize_sharegpt(Dataset.from_list([{"text": "a"}]))


def test_rows_become_conversations_with_optional_parts():
    done = to_sharegpt(
        Dataset.from_list(ALPACA), merged_prompt="{instruction}[[\nYour input is:\n{input}]]", output_column_name="output"
    )
    assert done.column_names == ["conversations"]
    assert done[2]["conversations"] == [
        {"from": "human", "value": "Count 2\nYour input is:\n2 ducks"},
        {"from": "gpt", "value": "2 eggs"},
    ]
    assert done[1]["conversations"][0]["value"] == "Count 1"
    kept = to_sharegpt(Dataset.from_list(ALPACA), remove_unused_columns=False)
    assert kept[3]["id"] == 3 and kept[3]["conversations"][0]["value"] == "Count 3"
    assert standardize_sharegpt(kept)[3]["conversations"][1] == {"role": "assistant", "content": "3 eggs"}


def test_rows_are_joined_into_longer_conversations():
    rows = Dataset.from_list(ALPACA)
    done = to_sharegpt(rows, conversation_extension=3)
    assert len(done) == len(rows)
    drawn = []
    for number, row in enumerate(done):
        turns = row["conversations"]
        numbers = [int(turn["value"].split()[-1]) for turn in turns[::2]]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 3
        assert numbers[0] == number and len(set(numbers)) == 3
        assert [turn["value"] for turn in turns[1::2]] == [f"{n} eggs" for n in numbers]
        drawn.append(numbers)
    assert to_sharegpt(rows, conversation_extension=3).to_list() == done.to_list()
    assert to_sharegpt(rows, conversation_extension=3, random_state=1).to_list() != done.to_list()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merged_prompt": "{question}"}, "has the columns instruction, input, output, id, and question is asked for"),
        ({"output_column_name": "answer"}, "and answer is asked for"),
        ({"merged_prompt": "{instruction}[[ {input}"}, "double brackets of merged_prompt must pair"),
        ({"merged_prompt": "no column"}, "must name columns in braces"),
        ({"conversation_extension": 8}, "must be 1 to the number of rows \\(7\\), got 8"),
    ],
)
def test_what_can_not_be_merged(settings, message):
    with pytest.raises(DataError, match=message):
        to_sharegpt(Dataset.from_list(ALPACA), **settings)
