"""The one door for documents that others wrote: JSON, YAML and text of a limited size and depth, checked against a schema.

Every error names the file, the key, what must hold and what was got. A caller names the class of its errors (CheckpointError,
DataError, RecipeError …), all of them `ForeignError`s.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

MEBIBYTE = 1 << 20
DOCUMENT_BYTES = 64 * MEBIBYTE  # an index of 100 000 tensors has 10
_DEPTH = 100
_NODES = 5_000_000
_SHOWN = 60
_LARGEST = 2**31 - 1
EXPRESSION_SECONDS = 5.0  # an expression over the names of 100 blocks takes a millisecond
_QUICK_REPEATS, _QUICK_CHOICES = 3, 8
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_TRIAL = """
import json, re, sys
expression, names = json.load(sys.stdin)
for name in names:
    re.match(expression, name)
    re.fullmatch(expression, name)
"""


class ForeignError(ValueError):
    """A file or document that can't be used: the message names it, the key, what must hold and what was got."""


Document = TypeVar("Document", bound=BaseModel)
ErrorType = type[ForeignError]


class _LastRead:
    """The file that was read last in this process: what an error that nobody foresaw is told with."""

    file: str | None = None


def last_read() -> str | None:
    """The file that went through the door last."""
    return _LastRead.file


class Schema(BaseModel):
    """A foreign document's fields. Types are exact, numbers finite, unknown keys ignored, and null is a key that is absent,
    unless it must be there."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        optional = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        return {key: value for key, value in values.items() if value is not None or key not in optional}


def checked(must: str, holds: Callable[[Any], bool]) -> BeforeValidator:
    """A validator for values of more than one type: ``must`` is what the error says must hold."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"must be {must}")
        return value

    return BeforeValidator(check)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)


Size = Annotated[int, checked("a positive integer below 2^31", lambda v: _is_integer(v) and 0 < v <= _LARGEST)]
Count = Annotated[int, checked("an integer from 0 to 2^31", lambda v: _is_integer(v) and 0 <= v <= _LARGEST)]
Positive = Annotated[float, Field(gt=0)]
Texts = Annotated[list[str], checked("a list of strings", _is_texts)]
TextOrTexts = Annotated[Any, checked("a string or a list of strings", lambda v: isinstance(v, str) or _is_texts(v))]


def shown(value: Any) -> str:
    """A value as an error shows it: short, with its type where that is not plain."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list that holds itself
        text = "…"
    text = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    kind = {dict: "an object", list: "a list"}.get(type(value))
    return f"{kind} {text}" if kind else text


def explain(detail: ErrorDetails, key: str) -> str:
    """One of pydantic's complaints, as ``key must be …, got …``."""
    if detail["type"] == "missing":
        return f"{key} is missing"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if detail["type"] in ("value_error", "assertion_error") and not message.startswith("must"):
        return f"{key}: {message}"
    return f"{key} {message}, got {shown(detail['input'])}"


def validated(schema: type[Document], value: Any, where: str | Path, error: ErrorType = ForeignError) -> Document:
    """The document as its schema has it.

    Args:
        where: the file that it is from, with which every error begins.

    Raises:
        ForeignError: (error) it is no object, or a field is missing or wrong; every one of them is listed.
    """
    if not isinstance(value, Mapping):
        raise error(f"{where} must hold an object of keys and values, got {shown(value)}")
    try:
        return schema.model_validate(value)
    except ValidationError as found:
        seen: dict[str, str] = {}
        for detail in found.errors(include_url=False):
            key = ".".join(str(part) for part in detail["loc"])
            seen.setdefault(key, explain(detail, key) if key else detail["msg"].removeprefix("Value error, "))
        raise error("\n  ".join(f"{where}: {line}" for line in seen.values())) from found


def local_path(text: str | os.PathLike[str], what: str, error: ErrorType = ForeignError) -> Path:
    """A path that a user wrote, ``~`` expanded."""
    written = os.fspath(text)
    if not written.strip() or "\0" in written:
        raise error(f"{what} must be a path, got {written!r}")
    try:
        return Path(written).expanduser()
    except RuntimeError as cause:  # no such user
        raise error(f"{what}: {written}: {cause}") from cause


def present(path: Path) -> bool:
    """Whether something is at a path; also False for one that the system can't even look at (too long a name)."""
    try:
        return path.exists()
    except OSError:
        return False


def check_writable_folder(folder: Path, what: str, error: ErrorType = ForeignError) -> None:
    """That a folder is there and can be written into, or could be made; nothing stays there."""
    for place in (folder, *folder.parents):
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            if place.is_symlink():
                raise error(f"{what}: {place} is a link to nothing; remove it, or name another folder") from None
            continue
        except NotADirectoryError:
            continue
        except OSError as cause:
            raise error(f"{what} must be a folder that can be written: {folder}: {cause.strerror}") from cause
        if not stat.S_ISDIR(mode):
            raise error(f"{what} must be a folder that can be written, and {place} is a file: name another")
        if not os.access(place, os.W_OK | os.X_OK):
            raise error(f"{what} must be a folder that can be written, and {place} can't be: name another, or change its mode")
        try:  # some file systems (/proc) say that they can be written
            tempfile.TemporaryDirectory(prefix=".tmp-", dir=place).cleanup()
        except OSError as cause:
            raise error(
                f"{what} must be a folder that can be written, and {place} can't be: {cause.strerror}; name another"
            ) from cause
        return


def read_bytes(file: Path, error: ErrorType = ForeignError, limit: int = DOCUMENT_BYTES) -> bytes:
    """A whole file, which must be a regular one of at most `limit` bytes."""
    with opened(file, error) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise error(f"{file} must be of at most {limit // MEBIBYTE} MiB, got {size / MEBIBYTE:.0f} MiB")
        return stream.read()


@contextmanager
def opened(file: Path, error: ErrorType = ForeignError) -> Iterator[BinaryIO]:
    """A regular file, open for reading; what goes wrong while it is read becomes `error` too."""
    _LastRead.file = str(file)
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for who writes
            raise error(f"{file} must be a file, got {'a folder' if file.is_dir() else 'a pipe or a device'}")
        with file.open("rb") as stream:
            yield stream
    except FileNotFoundError as cause:
        raise error(f"there is no file {file}") from cause
    except OSError as cause:
        raise error(f"{file} can't be read: {cause.strerror or cause}") from cause


def read_text(file: Path, error: ErrorType = ForeignError, limit: int = DOCUMENT_BYTES) -> str:
    """A whole file of UTF-8 text."""
    return decoded(read_bytes(file, error, limit), file, error)


def decoded(content: bytes, where: str | Path, error: ErrorType = ForeignError) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{where} must be UTF-8 text, got the byte 0x{content[cause.start]:02x} at place {cause.start}; save it as UTF-8"
        ) from cause


def parse_json(text: str, where: str | Path, error: ErrorType = ForeignError) -> Any:
    """JSON in which no object has a key twice, and nothing is nested deeper than 100 times.

    Raises:
        ForeignError: (error) it is not.
    """
    if not text.strip():
        raise error(f"{where} must be JSON, and is empty")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except _TwiceError as cause:
        raise error(f"{where}: the key {cause.args[0]!r} is there twice in one object") from None
    except json.JSONDecodeError as cause:
        line = f"line {cause.lineno}, " if "\n" in text.strip() else ""
        raise error(f"{where}: not JSON: {cause.msg} at {line}column {cause.colno}") from cause
    except ValueError as cause:  # an integer of more than 4300 digits
        raise error(f"{where} is not JSON that can be read: {cause}") from cause
    except RecursionError:
        raise error(f"{where} is nested too deeply; {_DEPTH} levels are allowed") from None
    _check_depth(value, where, error)
    return value


def read_json(file: Path, error: ErrorType = ForeignError, limit: int = DOCUMENT_BYTES) -> Any:
    """A JSON file; see `parse_json`."""
    return parse_json(read_text(file, error, limit), file, error)


def read_object(file: Path, error: ErrorType = ForeignError) -> dict[str, Any]:
    """A JSON file that holds an object."""
    value = read_json(file, error)
    if not isinstance(value, dict):
        raise error(f"{file} must hold an object of keys and values, got {shown(value)}")
    return value


class _TwiceError(Exception):
    """A key that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _TwiceError(key)
            seen.add(key)
    return found


def _check_depth(value: Any, where: str | Path, error: ErrorType) -> None:
    """Also of YAML, whose aliases make a short text a tree of any size, or one that holds itself."""
    level, nodes = [value], 0
    for depth in range(_DEPTH):
        level = [part for node in level for part in _parts(node)]
        nodes += len(level)
        if not level:
            return
        if nodes > _NODES:
            raise error(f"{where} holds too much: {_NODES} values are allowed (from level {depth} on it is more)")
    raise error(f"{where} is nested too deeply; {_DEPTH} levels are allowed")


def _parts(node: Any) -> Any:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def parse_yaml(text: str, where: str | Path, error: ErrorType = ForeignError, loader: Any = yaml.SafeLoader) -> Any:
    """YAML of plain data, no key twice in one mapping; loader: a SafeLoader of yaml.

    Raises:
        ForeignError: (error) it is not.
    """
    try:
        value = yaml.load(text, Loader=_without_twice(loader))
    except yaml.YAMLError as cause:
        raise error(f"{where} is not YAML: {' '.join(str(cause).split())}") from cause
    except RecursionError:
        raise error(f"{where} is nested too deeply; {_DEPTH} levels are allowed") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as cause:  # a date that is none, a key that is a list
        raise error(f"{where} is not YAML that can be read: {cause}") from cause
    _check_depth(value, where, error)
    return value


def _without_twice(loader: Any) -> Any:
    class Loader(loader):
        """Refuses a key that stands twice in one mapping, where yaml takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            seen: set[Any] = set()
            for key in own:
                text = key.value if isinstance(key.value, str) else str(key.value)
                if text in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {text!r} is there twice", key.start_mark)
                seen.add(text)
            return super().construct_mapping(node, deep)

    return Loader


def check_text(text: str, error: ErrorType = ForeignError) -> str:
    """The text, where UTF-8 can write it; an error names the half of a character (a lone surrogate) that it can't."""
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise error(
            f"a text must be of whole characters, got the lone surrogate {text[cause.start]!r} at {cause.start} of "
            f"{text[max(cause.start - 10, 0) : cause.start + 10]!r}; it was cut in the middle of a character"
        ) from cause
    return text


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_expression(
    expression: str, names: Iterable[str], what: str, error: ErrorType = ForeignError, around: str = "{}"
) -> None:
    """That a regular expression is one, and that matching it with each of the names comes to an end.

    Python's matching holds every thread up and can't be stopped, so an expression that could take long (repeats of groups, many
    repeats) is tried in a process of its own before. around: what it is put into before it is matched.

    Raises:
        ForeignError: (error) it is none, or takes longer than 5 s.
    """
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as cause:
        raise error(f"{what}: {expression!r} is no regular expression: {cause}; give names as a list") from cause
    repeats = sum(map(expression.count, "*+{?"))
    if repeats <= _QUICK_REPEATS and expression.count("|") <= _QUICK_CHOICES and not _REPEATED_GROUP.search(expression):
        return
    command, given = [sys.executable, "-I", "-S", "-c", _TRIAL], json.dumps([around.format(expression), list(names)])
    try:
        subprocess.run(command, input=given.encode(), timeout=EXPRESSION_SECONDS, capture_output=True, check=True)
    except subprocess.TimeoutExpired:
        raise error(
            f"{what}: the expression {expression!r} takes more than {EXPRESSION_SECONDS:g} s to match the model's layers; "
            "write it without repeats inside of repeats, or give names as a list"
        ) from None
    except subprocess.CalledProcessError as cause:
        last = (cause.stderr.decode(errors="replace").splitlines() or [""])[-1]
        raise error(f"{what}: the expression {expression!r} can't be matched: {last}") from None
