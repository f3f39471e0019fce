"""A valid document made wrong, systematically: the whole of it, and every key with every kind of wrong value."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsloth.foreign import ForeignError

REMOVED = object()


@dataclass(frozen=True)
class Case:
    """name: of the case; content: the file's; key and value: what is wrong, where one key is."""

    name: str
    content: bytes
    key: tuple[str, ...] = ()
    value: Any = REMOVED


def whole(original: bytes) -> Iterator[Case]:
    """The document as something else."""
    for name, content in {
        "a list": b"[1, 2]",
        "null": b"null",
        "a number": b"5",
        "a string": b'"text"',
        "not UTF-8": original[:-1] + b"\xff\xfe" + original[-1:],
        "UTF-16": b"\xff\xfe" + original.decode().encode("utf-16-le"),
        "nested deeply": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        "nested lists": b"[" * 300 + b"]" * 300,
        "empty": b"",
        "blank": b" \n\n",
        "cut": original[: len(original) // 2],
        "binary": bytes(range(256)),
        "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    }.items():
        yield Case(name, content)


def values_for(value: Any) -> dict[str, Any]:
    """Wrong values in the place of a right one; some are right by accident, which each kind's rule says."""
    wrong: dict[str, Any] = {
        "removed": REMOVED,
        "null": None,
        "an object": {"x": 1},
        "a list of it": [value],
        "an empty list": [],
        "negative": -abs(value) if isinstance(value, int | float) and value and not isinstance(value, bool) else -1,
        "zero": 0,
        "NaN": float("nan"),
        "infinite": float("inf"),
        "huge": 10**30,
        "digits": "12",
        "an empty string": "",
        "true": "yes" if isinstance(value, bool) else True,
    }
    return wrong


def keys(document: dict[str, Any], dump: Callable[[Any], str] = json.dumps, inside: tuple[str, ...] = ()) -> Iterator[Case]:
    """Every key (also of the objects that `inside` names) with every wrong value, and every key twice."""
    for path, value in _paths(document, inside):
        for name, wrong in values_for(value).items():
            changed = copy.deepcopy(document)
            place = changed
            for part in path[:-1]:
                place = place[part]
            if wrong is REMOVED:
                del place[path[-1]]
            else:
                place[path[-1]] = wrong
            yield Case(f"{'.'.join(path)} {name}", dump(changed).encode(), path, wrong)
    text = json.dumps(document)
    first = next(iter(document))
    yield Case("a key twice", (text[:-1] + f", {json.dumps(first)}: {json.dumps(document[first])}}}").encode())


def _paths(document: dict[str, Any], inside: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in document.items():
        yield (key,), value
        if key in inside:
            for part, held in value.items():
                yield (key, part), held


@dataclass
class Outcome:
    """What a kind's cases came to."""

    kind: str
    refused: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.wrong: list[str] = []

    @property
    def total(self) -> int:
        return self.refused + self.accepted + len(self.wrong)


def judge(kind: str, cases: Iterator[tuple[Case, Callable[[], Any], str]], allowed: Callable[[Case, Any], bool]) -> Outcome:
    """Opens every case's door. An error must be one of ours and name the file; what is accepted must be `allowed`."""
    outcome = Outcome(kind)
    for case, door, file in cases:
        try:
            found = door()
        except ForeignError as error:
            if file in str(error) and len(str(error)) > len(file) + 5:
                outcome.refused += 1
            else:
                outcome.wrong.append(f"{case.name}: the error does not name {file}: {error}")
        except Exception as error:
            outcome.wrong.append(f"{case.name}: raw {type(error).__name__}: {str(error)[:200]}")
        else:
            if allowed(case, found):
                outcome.accepted += 1
            else:
                outcome.wrong.append(f"{case.name}: accepted in silence")
    return outcome


def same_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
