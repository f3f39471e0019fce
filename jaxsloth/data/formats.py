"""A row of a data set → a conversation, a text, or tokens: what each format expects and how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxsloth.batch import IGNORE
from jaxsloth.data.errors import DataError
from jaxsloth.recipe import DataRecipe

Message = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "function_response": "tool"}
_FIELDS: dict[str, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_OPTIONAL = ("labels", "input")
# Arguments of apply_chat_template that say how rows are rendered here.
_RENDERING = {"add_generation_prompt", "chat_template", "continue_final_message", "return_dict", "tokenize", "tools"}

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content, for a chat template. The assistant's are learnt, from message `first_learnt` on.

    settings: values of the template's own variables (Qwen 3's enable_thinking).
    """

    messages: list[Message]
    first_learnt: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Plain text, learnt whole."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenized before: ids and which of them are learnt."""

    tokens: np.ndarray  # int32 [length]
    learn: np.ndarray  # bool [length]


def row_reader(data: DataRecipe, row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Conversation | Text | Tokens]:
    """The function that reads this data set's rows.

    Args:
        data: its format, its columns (expected field → the file's field) and system message count.
        row: the first row: format "auto" is the first of pre-tokenized (`input_ids`), messages, conversations (ShareGPT),
            prompt and completion, Alpaca (instruction, output, perhaps input) and text whose fields are there.

    Raises:
        DataError: no format fits, or columns names a field that no format expects.
    """
    known = [*(field for fields in _FIELDS.values() for field in fields), *_OPTIONAL]
    for expected in data.columns:
        if expected not in known:
            raise DataError(
                f"data.columns maps an expected field to the file's field, and no format expects {expected!r}; "
                f"expected fields are {', '.join(known)}"
            )
    for expected, of_file in data.columns.items():
        if of_file not in row:
            raise DataError(
                f"data.columns says that {expected} is the file's field {of_file!r}, and the first row has {', '.join(row)}"
            )
    first = _rename(row, data.columns)
    name = data.format if data.format != "auto" else _detect(first)
    if name == "messages" and "messages" not in first and "conversations" in first:
        name = "sharegpt"
    read = _READERS[name]

    def read_row(row: Mapping[str, Any]) -> Conversation | Text | Tokens:
        row = _rename(row, data.columns)
        missing = [field for field in _FIELDS[name] if row.get(field) is None]
        if missing:
            raise DataError(
                f"format {name!r} expects the fields {', '.join(_FIELDS[name])}, and {', '.join(missing)} is missing; the row "
                f"has {', '.join(row)}. Set data.format, or map the names: data.columns: {{{missing[0]}: <the file's field>}}"
            )
        content = read(row)
        if not isinstance(content, Conversation):
            return content
        return replace(_with_system(content, data.system), settings={**_settings(row), **_tools(row)})

    return read_row


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A field that is mapped is the file's other one, or none."""
    renamed = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return renamed | {expected: row[name] for expected, name in columns.items() if name in row}


def _detect(row: Mapping[str, Any]) -> str:
    for name, fields in _FIELDS.items():
        if all(field in row for field in fields):
            return name
    expected = "; ".join(" + ".join(fields) for fields in _FIELDS.values())
    raise DataError(
        f"no format fits a row with the fields {', '.join(row)}; expected one of: {expected}. "
        "Map the names, e.g. data.columns: {prompt: question, completion: answer}"
    )


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    if system is None or any(message["role"] == "system" for message in conversation.messages):
        return conversation
    first = {"role": "system", "content": system}
    return Conversation([first, *conversation.messages], conversation.first_learnt + 1)


def _settings(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """TRL's column chat_template_kwargs."""
    settings = row.get("chat_template_kwargs") or {}
    if not isinstance(settings, Mapping) or _RENDERING & set(settings):
        others = ", ".join(sorted(_RENDERING))
        raise DataError(
            f"chat_template_kwargs must hold the template's own variables by name, not {others}, got {_shown(settings)}"
        )
    return settings


def _tools(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's functions, which a template writes: a list of them, or its JSON as TRL takes it."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools must be a list of functions or its JSON: {error}") from error
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools must be a list of functions (objects) or its JSON, got {_shown(tools)}")
    return {"tools": tools}


def _read_messages(row: Mapping[str, Any]) -> Conversation:
    return Conversation(_messages(row["messages"], "messages"))


def _read_sharegpt(row: Mapping[str, Any]) -> Conversation:
    turns = row["conversations"]
    if isinstance(turns, list) and all(isinstance(turn, Mapping) and "from" in turn and "value" in turn for turn in turns):
        turns = [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    return Conversation(_messages(turns, "conversations"))


def _read_prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """Strings are one user's and one assistant's message; lists of messages are joined. Only the completion is learnt."""
    prompt = row["prompt"]
    before = [_message("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt")
    completion = row["completion"]
    after = [_message("assistant", completion)] if isinstance(completion, str) else _messages(completion, "completion")
    return Conversation(before + after, first_learnt=len(before))


def _read_alpaca(row: Mapping[str, Any]) -> Conversation:
    instruction, context, output = (_string(row.get(field) or "", field) for field in ("instruction", "input", "output"))
    question = f"{instruction}\n\n{context}" if context else instruction
    return Conversation([_message("user", question), _message("assistant", output)])


def _read_text(row: Mapping[str, Any]) -> Text:
    return Text(_string(row["text"], "text"))


def _read_tokens(row: Mapping[str, Any]) -> Tokens:
    tokens = _integers(row["input_ids"], "input_ids")
    if tokens.size and tokens.min() < 0:
        raise DataError(f"input_ids must not be negative, got {tokens.min()}")
    labels = tokens if row.get("labels") is None else _integers(row["labels"], "labels")
    if labels.shape != tokens.shape:
        raise DataError(f"labels must be as long as input_ids, got {labels.size} labels and {tokens.size} input_ids")
    learn = labels != IGNORE
    if np.any(labels[learn] != tokens[learn]):
        raise DataError(f"each label must be {IGNORE} or the input id at its own position (labels are not shifted)")
    return Tokens(tokens, learn)


_READERS: dict[str, Callable[[Mapping[str, Any]], Conversation | Text | Tokens]] = {
    "tokens": _read_tokens,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "prompt_completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "text": _read_text,
}


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{field} must be a list of messages with role and content, got {_shown(value)}")
    messages = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{place} must be a message with role and content, got {_shown(message)}")
        # Columnar files give every message every key: those without a value are no part of it.
        filled = {key: part for key, part in message.items() if part is not None}
        if not filled.get("tool_calls"):
            filled["content"] = _content(message.get("content"), f"{place}.content")
        messages.append({"content": "", **filled})
    return messages


def _content(value: Any, field: str) -> str | list[dict[str, str]]:
    """A text, or a list of parts that are texts."""
    if not isinstance(value, list):
        return _string(value, field)
    parts = []
    for number, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"{field}[{number}] must be a part of text, {{type: text, text: …}}, got {_shown(part)}")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def content_text(message: Mapping[str, Any]) -> str:
    """What a message says, its parts of text joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{field} must be text, got {_shown(value)}")
    return value


def _integers(value: Any, field: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"{field} must be a list of integers, got {_shown(value)}")
    if array.size and not -_LARGEST <= array.min() <= array.max() <= _LARGEST:
        worst = max(array.max(), array.min(), key=abs)
        raise DataError(f"{field} must hold token ids, got {worst}, which no vocabulary has")
    return array.astype(np.int32)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
