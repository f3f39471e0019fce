"""The data sets that trainers are given: what they may be, and how much of one without a length is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxsloth.data.encode import Example
from jaxsloth.data.errors import DataError

Held = list[Example] | dict[str, list[Example]]


def each(rows: Any, name: str, made: Callable[[Any, str], list[Example]]) -> Held:
    """What is made of the rows to evaluate on, which may be several data sets by name, as transformers takes them.

    Raises:
        DataError: there is none among them, or what is called one is none (`check_rows`).
    """
    if not isinstance(rows, Mapping):
        check_rows(rows, name)
        return made(rows, name)
    if not rows:
        raise DataError(f"{name} must be a data set or several by name, got none; leave it out")
    for key, value in rows.items():
        check_rows(value, f"{name}[{key!r}]")
        if value is None:
            raise DataError(f"{name}[{key!r}] must be a data set, got None")
    return {str(key): made(value, f"{name}[{key!r}]") for key, value in rows.items()}


def one_of(own: Held | None, rows: Any, made: Callable[[Any, str], list[Example]]) -> list[Example]:
    """One data set to evaluate on: what is made of `rows`, or of one's own that of this name, or the only one.

    Raises:
        ValueError: there is none, or several and no name.
    """
    if isinstance(rows, str):
        if not isinstance(own, dict) or rows not in own:
            names = ", ".join(own) if isinstance(own, dict) else "none"
            raise ValueError(f"eval_dataset must name one of the trainer's own ({names}), got {rows!r}")
        own = own[rows]
    elif rows is not None:
        own = each(rows, "eval_dataset", made)
    if isinstance(own, dict):
        raise ValueError(f"there are several data sets to evaluate on, so name one: {', '.join(own)}")
    if not own:
        raise ValueError("there is nothing to evaluate on; give eval_dataset")
    return own


def all_of(held: Held | None) -> list[Example]:
    """All of one data set or of several."""
    if isinstance(held, dict):
        return [example for examples in held.values() for example in examples]
    return held or []


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
