"""The data sets that trainers are given: what they may be, and how much of one without a length is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxsloth.data.errors import DataError


def check_rows(rows: Any, name: str) -> None:
    """That `rows` gives rows: dicts of fields.

    Raises:
        DataError: it is a dict of data sets, a text, a table of columns, or gives nothing one by one.
    """
    if rows is None:
        return
    if isinstance(rows, Mapping):
        splits = list(rows)
        advice = f"pass one of them, as {name}=dataset[{splits[0]!r}]" if splits else "pass one with rows"
        shown = ", ".join(map(str, splits)) or "nothing"
        raise DataError(f"{name} must be one data set, got a {type(rows).__name__} of {shown}; {advice}")
    if isinstance(rows, str | bytes):
        raise DataError(f"{name} must be a data set, got the text {rows!r}; pass datasets.load_dataset(…) of it")
    if hasattr(rows, "columns") and hasattr(rows, "iloc"):
        raise DataError(f"{name} must be a data set, got a table of pandas; pass datasets.Dataset.from_pandas(table)")
    if not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise DataError(f"{name} must be a data set or a list of rows, got {type(rows).__name__}")


def as_row(value: Any, name: str, number: int) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{name}, row {number} (counted from 0) must be a dict of fields, got {type(value).__name__}")
    return dict(value)


def rows_needed(rows: Any, args: Any, rows_a_step: int) -> int | None:
    """How many rows of a data set without a length a run visits, in their order; None: it has one, and is read whole.

    Raises:
        ValueError: it has none, and args.max_steps says not how long the run is.
    """
    try:
        len(rows)
    except TypeError:
        if args.max_steps <= 0:
            raise ValueError(
                "train_dataset has no length (an IterableDataset, a generator), so max_steps must say how many steps the run "
                f"has, got max_steps={args.max_steps}"
            ) from None
        return args.max_steps * rows_a_step
    return None
