"""Rows from files and Hugging Face datasets."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jaxsloth.convert.checkpoint import PACKAGE_SCHEME, package_file
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.errors import DataError

Row = dict[str, Any]
_LONGEST_FIELD = 2**31 - 1


def load_rows(path: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """Reads rows, in their order.

    Args:
        path: a ``.json`` (a list of objects, or one object a line), ``.jsonl``, ``.csv`` or ``.parquet`` file;
            ``package:NAME/file`` for a file inside an installed Python package, which is not imported; else a folder that
            `datasets` understands, or a Hugging Face dataset ``name`` or ``name:configuration``.
        split: the data set's split. A file is one split, "train".
        limit: read the first rows only.

    Raises:
        DataError: no such file, data set or split, a file that doesn't parse (names the line), or no rows.
    """
    file = _package_file(path) if path.startswith(PACKAGE_SCHEME) else Path(path).expanduser()
    if file.suffix.lower() in _READERS:
        rows = _read_file(file, split, limit)
    elif file.is_file():
        raise DataError(f"{file}: the data file must end in one of {', '.join(_READERS)}")
    else:
        rows = _load_dataset(path, split, limit)
    if not rows:
        raise DataError(f"{path} holds no rows (split {split!r}); training needs at least one")
    return rows


def is_file_path(path: str) -> bool:
    """Whether `load_rows` reads this path as a file, which has no splits."""
    return path.startswith(PACKAGE_SCHEME) or Path(path).suffix.lower() in _READERS


def _package_file(path: str) -> Path:
    try:
        return package_file(path)
    except CheckpointError as error:
        raise DataError(f"no data file: {error}") from error


def _read_file(file: Path, split: str, limit: int | None) -> list[Row]:
    if not file.is_file():
        raise DataError(f"no data file at {file}")
    if split != "train":
        raise DataError(f"{file} is a file: it has one split, 'train', and {split!r} was asked for")
    try:
        return list(islice(_READERS[file.suffix.lower()](file), limit))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} must be UTF-8 text: {error}") from error


def _read_json(file: Path) -> Iterator[Row]:
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(file)
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    for number, value in enumerate(values):
        yield _object(value, f"{file}, entry {number}")


def _read_json_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{file}, line {number}: not a JSON object: {error.msg} at column {error.colno}; "
                    "each line must hold one object, or the file one list of objects"
                ) from error
            yield _object(value, f"{file}, line {number}")


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{place}: a row must be an object like {{"text": …}}, and {type(value).__name__} came')
    return value


def _read_csv(file: Path) -> Iterator[Row]:
    former = csv.field_size_limit(_LONGEST_FIELD)  # the default of 131072 characters is less than a long document
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    expected = len(reader.fieldnames or ())
                    raise DataError(f"{file}, line {reader.line_num}: a row must have the header's {expected} fields")
                yield row
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(former)


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a whole Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _load_dataset(path: str, split: str, limit: int | None) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, configuration = path.partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, DatasetsError) as error:
        raise DataError(
            f"{path!r} is neither a {', '.join(_READERS)} file nor a Hugging Face dataset that can be loaded: {error}"
        ) from error
    except ValueError as error:  # what datasets raises for an unknown split or configuration; its message lists those it has
        raise DataError(f"data set {path!r}, split {split!r}: {error}") from error
    rows = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    return [dict(row) for row in rows]
