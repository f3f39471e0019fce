"""No argument is swallowed: it is used, refused with the reason, or named in one warning."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

_said: set[str] = set()


def refuse_unknown(
    function: str, known: Iterable[str], given: Mapping[str, Any], elsewhere: Mapping[str, str] | None = None
) -> None:
    """TypeError names the first argument that `function` does not know, and the nearest one that it does. elsewhere: arguments
    that belong to another call -> what to write instead."""
    names = sorted(known)
    for name in given:
        if name in (elsewhere or {}):
            raise TypeError(f"{function} has no argument {name!r}; write {(elsewhere or {})[name]}")
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(names)}"
        raise TypeError(f"{function} has no argument {name!r}; {hint}")


def refuse_where_set(function: str, given: Mapping[str, Any], reasons: Mapping[str, tuple[Any, str]]) -> None:
    """ValueError for the first argument that is neither None nor what turns it off; reasons: name -> (off, why)."""
    for name, (off, reason) in reasons.items():
        value = given.get(name)
        if value is not None and value != off:
            raise ValueError(f"{function} can't take {name}={value!r}: {reason}")


def warn_where_set(function: str, given: Mapping[str, Any], reasons: Mapping[str, tuple[Any, str]]) -> None:
    """One warning that names every argument that is neither None nor its default, and why it changes nothing."""
    found = [
        f"{name}={given[name]!r} ({reason})"
        for name, (default, reason) in reasons.items()
        if given.get(name) is not None and given[name] != default
    ]
    if found:
        warn_once(f"{function}: these arguments change nothing here: " + "; ".join(found))


def warn_renamed(function: str, former: str, today: str) -> None:
    """A FutureWarning, once: an argument came under the name that it had in transformers 4 or TRL 0.x, and is used."""
    warn_once(f"{function}: {former} is called {today} now, and is taken as that", FutureWarning)


def warn_once(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning, the first time only, wherever it comes from."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, category, stacklevel=3)
