"""Rows from files and Hugging Face datasets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from jaxsloth.convert.checkpoint import PACKAGE_SCHEME, package_file
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.errors import DataError
from jaxsloth.foreign import decoded, local_path, opened, parse_json, present, read_text, shown

Row = dict[str, Any]
_LONGEST_FIELD = 2**31 - 1
_MOST_BYTES = 1 << 40  # rows are read a line at a time where the format allows it


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
    file = _package_file(path) if path.startswith(PACKAGE_SCHEME) else local_path(path, "data.path", DataError)
    if file.suffix.lower() in _READERS:
        rows = _read_file(file, split, limit)
    elif _is_file(file):
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
    if not present(file):
        raise DataError(f"no data file at {file}")
    if split != "train":
        raise DataError(f"{file} is a file: it has one split, 'train', and {split!r} was asked for")
    return list(islice(_READERS[file.suffix.lower()](file), limit))


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # too long a name
        return False


def _read_json(file: Path) -> Iterator[Row]:
    text = read_text(file, DataError, _MOST_BYTES)
    if not text.lstrip().startswith("["):
        yield from _rows_of_lines(text.split("\n"), file)
        return
    for number, value in enumerate(parse_json(text, file, DataError)):
        yield _object(value, f"{file}, entry {number}")


def _read_json_lines(file: Path) -> Iterator[Row]:
    with opened(file, DataError) as lines:
        yield from _rows_of_lines((decoded(line, f"{file}, line {n}", DataError) for n, line in enumerate(lines, 1)), file)


def _rows_of_lines(lines: Iterable[str], file: Path) -> Iterator[Row]:
    for number, text in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        if not text.strip():
            continue
        try:
            value = parse_json(text, place, DataError)
        except DataError as error:
            raise DataError(f"{error}; each line must hold one object, or the file one list of objects") from error
        yield _object(value, place)


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{place}: a row must be an object like {{"text": …}}, got {shown(value)}')
    return value


def _read_csv(file: Path) -> Iterator[Row]:
    former = csv.field_size_limit(_LONGEST_FIELD)  # the default of 131072 characters is less than a long document
    reader = None
    try:
        with opened(file, DataError) as stream:
            reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
            names = reader.fieldnames or ()
            twice = [name for place, name in enumerate(names) if name in names[:place]]
            if twice:
                raise DataError(f"{file}, line 1: the header has the field {twice[0]!r} twice")
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{file}, line {reader.line_num}: a row must have the header's {len(names)} fields")
                yield row
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.reader.line_num if reader else 1}: not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} must be UTF-8 text: {error}; save it as UTF-8") from error
    finally:
        csv.field_size_limit(former)


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with opened(file, DataError) as stream:
        try:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches():
                yield from batch.to_pylist()
        except GeneratorExit:
            raise
        except Exception as error:  # Arrow's own errors, and whatever a wrong length or code makes of its readers
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
    except Exception as error:  # an unknown split or configuration: ValueError, which lists those it has; files of any kind
        raise DataError(f"data set {path!r}, split {split!r}: {str(error) or type(error).__name__}") from error
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"data set {path!r}: split {split!r} must name one split of rows, got {type(dataset).__name__}")
    rows = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    return [dict(row) for row in rows]
