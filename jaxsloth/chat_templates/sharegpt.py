"""Data sets in the forms that chat templates read: ShareGPT's, and messages with role and content."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

import numpy as np

from jaxsloth.data.errors import DataError

_COLUMNS = ("conversations", "messages")
_KEYS = (("from", "value"), ("role", "content"))
_KEPT_ROLES = ("tool", "ipython")
_OPTIONAL_PART = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


def standardize_sharegpt(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """A data set whose conversations are messages with ``role`` and ``content``.

    Args:
        dataset: a datasets.Dataset, IterableDataset or DatasetDict with the column "conversations" or "messages", whose
            messages have the keys from and value, or role and content. The column keeps its name; others are left alone.
        tokenizer: not needed; accepted as Unsloth's is.
        aliases_for_system, aliases_for_user, aliases_for_assistant: what the data calls the speakers.

    Raises:
        DataError: no such column, or a message with other keys or an unknown speaker; the row is named.
    """
    del tokenizer
    roles = {
        alias: role
        for role, aliases in (("system", aliases_for_system), ("user", aliases_for_user), ("assistant", aliases_for_assistant))
        for alias in (role, *aliases)
    } | {role: role for role in _KEPT_ROLES}
    column = _conversation_column(dataset)

    def standardize(batch: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
        return {
            column: [
                [
                    _standard_message(message, roles, f"row {place}, {column}[{number}]")
                    for number, message in enumerate(messages)
                ]
                for place, messages in zip(places, batch[column], strict=True)
            ]
        }

    return _map(dataset, standardize, batch_size=batch_size, num_proc=num_proc, with_indices=True, remove_columns=[column])


def standardize_data_formats(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output", "model"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """`standardize_sharegpt`, which also knows Gemma's "model" for the assistant."""
    return standardize_sharegpt(
        dataset, tokenizer, aliases_for_system, aliases_for_user, aliases_for_assistant, batch_size, num_proc
    )


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """A data set of conversations in ShareGPT's form, made of rows with one answer each.

    Args:
        dataset: a datasets.Dataset.
        merged_prompt: the question's text with columns in braces, for instance
            ``"{instruction}[[\\nYour input is:\\n{input}]]"``; a part in double brackets is left out where one of its columns
            is empty. "" takes the column merged_column_name as the question.
        merged_column_name: the question's column, if merged_prompt is "".
        output_column_name: the answer's column.
        remove_unused_columns: keep only "conversations".
        conversation_extension: how many rows make one conversation: each row, followed by others drawn at random. The data
            set keeps its length, and no row is drawn twice for the same place.
        random_state: what is drawn.

    Returns:
        The data set with the column "conversations": ``[{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]``.

    Raises:
        DataError: a column that the data set lacks (those that it has are listed), brackets that don't pair, or
            conversation_extension out of 1 to the number of rows.
    """
    ask, needed = _question(merged_prompt, merged_column_name)
    have = dataset.column_names
    missing = [column for column in (*needed, output_column_name) if column not in have]
    if missing:
        raise DataError(f"the data set has the columns {', '.join(have)}, and {', '.join(missing)} is asked for")
    if not 1 <= conversation_extension <= len(dataset):
        raise DataError(
            f"conversation_extension must be 1 to the number of rows ({len(dataset)}), got {conversation_extension}"
        )
    pairs = [
        [{"from": "human", "value": ask(row)}, {"from": "gpt", "value": str(row[output_column_name])}]
        for row in dataset.select_columns([*dict.fromkeys([*needed, output_column_name])])
    ]
    generator = np.random.Generator(np.random.Philox(key=random_state))
    # Row i is followed by the rows some distances further on in a random order: distinct distances, so no row comes twice.
    order = generator.permutation(len(pairs))
    place = np.argsort(order)
    distances = 1 + generator.permutation(len(pairs) - 1)[: conversation_extension - 1]
    conversations = []
    for row in range(len(pairs)):
        following = [int(order[(place[row] + distance) % len(pairs)]) for distance in distances]
        conversations.append([message for member in (row, *following) for message in pairs[member]])
    unused = have if remove_unused_columns else [column for column in have if column == "conversations"]
    kept = dataset.remove_columns(unused)
    if not kept.column_names:
        return type(dataset).from_dict({"conversations": conversations})
    return kept.add_column("conversations", conversations)


def _question(merged_prompt: str, column: str) -> tuple[Callable[[Mapping[str, Any]], str], list[str]]:
    """The function that writes a row's question, and the columns that it reads."""
    if not merged_prompt:
        return lambda row: str(row[column]), [column]
    if "[[" in _OPTIONAL_PART.sub("", merged_prompt) or "]]" in _OPTIONAL_PART.sub("", merged_prompt):
        raise DataError(f"the double brackets of merged_prompt must pair, without any inside others: {merged_prompt!r}")
    pieces = _OPTIONAL_PART.split(merged_prompt)  # texts that always stand at even places, optional parts at odd ones
    fields = [[field for _, field, _, _ in Formatter().parse(piece) if field is not None] for piece in pieces]
    needed = [*dict.fromkeys(field for names in fields for field in names)]
    if not needed or "" in needed:
        raise DataError(f"merged_prompt must name columns in braces, such as {{instruction}}, got {merged_prompt!r}")

    def ask(row: Mapping[str, Any]) -> str:
        filled = {field: "" if row[field] is None else row[field] for field in needed}
        return "".join(
            piece.format(**filled)
            for number, piece in enumerate(pieces)
            if number % 2 == 0 or all(str(filled[field]) for field in fields[number])
        )

    return ask, needed


def _conversation_column(dataset: Any) -> str:
    names = dataset.column_names
    if isinstance(names, Mapping):  # a DatasetDict
        names = next(iter(names.values()), [])
    found = [column for column in _COLUMNS if column in (names or [])]
    if not found:
        raise DataError(f"the data set must have the column {' or '.join(_COLUMNS)}, and it has: {', '.join(names or [])}")
    return found[0]


def _standard_message(message: Mapping[str, Any], roles: Mapping[str, str], place: str) -> dict[str, Any]:
    for role, content in _KEYS:
        if message.get(role) is not None:
            if message[role] not in roles:
                raise DataError(
                    f"{place}: the speaker {message[role]!r} is none of {', '.join(roles)}; name it in aliases_for_user, "
                    "aliases_for_assistant or aliases_for_system"
                )
            others = {key: part for key, part in message.items() if key not in (role, content) and part is not None}
            return {"role": roles[message[role]], "content": message.get(content) or ""} | others
    raise DataError(f"{place} must have the keys from and value, or role and content, and it has: {', '.join(message)}")


def _map(dataset: Any, function: Callable[..., Any], *, num_proc: int | None, **settings: Any) -> Any:
    if num_proc is not None and not _is_streaming(dataset):
        settings |= {"num_proc": num_proc}
    return dataset.map(function, batched=True, **settings)


def _is_streaming(dataset: Any) -> bool:
    return type(dataset).__name__.startswith("Iterable")
