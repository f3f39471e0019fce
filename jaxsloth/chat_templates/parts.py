"""Where answers begin and end in tokenized conversations, found by the texts of a template's headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsloth.data.errors import DataError
from jaxsloth.data.templates import ChatTemplate

_SPACE = "▁"  # SentencePiece's
_ASKED = ("first question", "second question")
_ANSWERED = ("first answer", "second answer")
_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "duck"}}}


@dataclass(frozen=True)
class Parts:
    """The texts after which an answer begins, and at which it has ended.

    response: the header of an answer. ends: headers of whatever else may follow one.
    """

    response: str
    ends: tuple[str, ...]


def find_parts(tokenizer: Any) -> Parts:
    """The headers that the tokenizer's chat template writes.

    Raises:
        DataError: there is no template, it drops a role, or its turns have no headers that tell them apart.
    """
    template = ChatTemplate(tokenizer)
    talk = [
        {"role": role, "content": content}
        for asked, answered in zip(_ASKED, _ANSWERED, strict=True)
        for role, content in (("user", asked), ("assistant", answered))
    ]
    template.check_roles(talk)
    text = template.render(talk)
    response = _between(text, _ASKED[0], _ANSWERED[0]).rstrip(" ")
    question, asked = template.render(talk[:1]), template.render(talk[:1], answer_follows=True)
    header = asked.removeprefix(question)
    if asked.startswith(question) and header.strip() and header in response:
        response = header
    instruction = _header(tokenizer, _between(text, _ANSWERED[0], _ASKED[1]), _after(template.render(talk[:2]), _ANSWERED[0]))
    if not response.strip() or not instruction.strip():
        raise DataError(
            "the chat template puts no header before a question or an answer, so that answers can't be found; give "
            "instruction_part and response_part, the texts that stand before each"
        )
    called = [talk[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    others = [
        _next_header(template, before, role) for before, role in ((talk[:2], "tool"), (called, "tool"), (talk[:2], "system"))
    ]
    first = [tokenizer.bos_token] if tokenizer.bos_token not in (None, tokenizer.eos_token) else []
    return Parts(response, (instruction, *dict.fromkeys([*filter(None, others), *first])))


def _between(text: str, before: str, after: str) -> str:
    return _after(text, before).partition(after)[0]


def _after(text: str, before: str) -> str:
    return text.partition(before)[2]


def _header(tokenizer: Any, between: str, end: str) -> str:
    """What of the text between an answer and a question is the question's: all but what also ends a conversation."""
    cut = next((place for place, pair in enumerate(zip(between, end, strict=False)) if pair[0] != pair[1]), len(end))
    for token in tokenizer.added_tokens_decoder.values():
        place = between.rfind(str(token), 0, cut + len(str(token)) - 1)
        if place >= 0 and place < cut < place + len(str(token)):  # never in the middle of a special token
            cut = place
    return between[cut:]


def _next_header(template: ChatTemplate, before: Sequence[dict[str, Any]], role: str) -> str | None:
    """The header of a role after a conversation; None where the template has none there."""
    said = "what is said"
    try:
        start, text = template.render(before), template.render([*before, {"role": role, "content": said}])
    except DataError:
        return None
    header = text.removeprefix(start).partition(said)[0]
    return header if text.startswith(start) and said in text and header.strip() else None


class AnswerFinder:
    """Which tokens of a conversation are answers: ``finder(ids) -> bool [length]``.

    An answer reaches from the end of the response header to the next header, or the end; the token that ends the turn is part
    of it. The texts are looked for in the bytes that the tokens stand for, so that it doesn't matter into which tokens they
    were cut next to what is said, and a token across a border is learnt where it holds a part of the answer.
    """

    def __init__(self, tokenizer: Any, parts: Parts) -> None:
        self._piece = token_bytes(tokenizer)
        self._response = parts.response.encode()
        self._ends = [part.encode() for part in (*parts.ends, parts.response)]

    def __call__(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        pieces = [self._piece(int(token)) for token in ids]
        text = b"".join(pieces)
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(pieces)]
        learn = np.zeros(len(pieces), bool)
        place = 0
        while (found := text.find(self._response, place)) >= 0:
            begin = found + len(self._response)
            place = min((end for part in self._ends if (end := text.find(part, begin)) >= 0), default=len(text))
            learn |= (ends > begin) & (starts < place)
        return learn


def token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """The function from a token's id to the bytes that it stands for, for byte-level and SentencePiece vocabularies."""
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    is_byte_level = _SPACE not in tokenizer.get_vocab()
    alphabet = _byte_alphabet()
    known: dict[int, bytes] = {}

    def stands_for(number: int) -> bytes:
        if number in added:
            return added[number].encode()
        token = tokenizer.convert_ids_to_tokens(number)
        if token is None:
            raise DataError(f"the tokenizer has no token {number}; the data was tokenized with another")
        if is_byte_level:
            return bytes(alphabet[character] for character in token) if all(c in alphabet for c in token) else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()

    def look_up(number: int) -> bytes:
        if number not in known:
            known[number] = stands_for(number)
        return known[number]

    return look_up


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, the other bytes in order for the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
