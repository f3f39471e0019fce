"""The error of everything that is wrong with a user's data."""

from __future__ import annotations

from collections.abc import Sequence

from jaxsloth.foreign import ForeignError


class DataError(ForeignError):
    """Data that can't be trained on: what must hold, what came, what to do."""


def first_few(items: Sequence[object], shown: int = 5) -> str:
    """``3, 8, 11, 12, 40 and 7 more``: enough to find the rows, never a screenful."""
    text = ", ".join(str(item) for item in items[:shown])
    return text if len(items) <= shown else f"{text} and {len(items) - shown} more"
