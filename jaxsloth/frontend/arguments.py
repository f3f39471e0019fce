"""Refusing arguments that nobody reads, with the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def refuse_unknown(function: str, known: Iterable[str], given: Mapping[str, Any]) -> None:
    """TypeError names the first argument that `function` does not know, and the nearest one that it does."""
    names = sorted(known)
    for name in given:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(names)}"
        raise TypeError(f"{function} has no argument {name!r}; {hint}")
