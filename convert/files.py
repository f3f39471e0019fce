"""Writing files so that a crash leaves either the old state or the whole new one."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from jaxsloth.foreign import check_writable_folder

logger = logging.getLogger("jaxsloth.convert")

TEMPORARY_PREFIX = ".tmp-"
_SPARE = 16 << 20  # bytes that stay free
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ExistsError(FileExistsError, ValueError):
    """Something would be overwritten without having been asked."""


class WriteError(OSError, ValueError):
    """A place has too little room, or stopped taking what is written."""


def check_target(target: Path, *, folder: bool, overwrite: bool) -> None:
    """That something may be written in a place: nothing is there, or what may be overwritten and is of the same kind.

    Raises:
        ExistsError: it may not be.
    """
    kind = "folder" if folder else "file"
    if target.name in ("", ".."):
        raise ExistsError(f"{target} must be a {kind} that is named itself, not by '.' or '..'")
    if target.is_symlink() and (folder or not target.exists()):
        raise ExistsError(f"{target} is a link; name the {kind} that it is to lead to")
    if not target.exists():
        return
    if target.is_dir() != folder:
        raise ExistsError(
            f"{target} is a {'file' if folder else 'folder'}, and a {kind} is to be written; choose another place"
        )
    if not overwrite:
        raise ExistsError(f"{target} exists already; choose another place, or ask for it to be overwritten (--overwrite)")


# What tells a folder that a conversion may replace from one that holds other things.
_MARKS = ("config.json", "adapter_config.json", "tokenizer_config.json", "model.safetensors", "params")


def check_replaced(target: Path, read: Iterable[Path]) -> None:
    """That nothing of what is read lies where is to be written, and that a folder which is replaced holds a model or an
    adapter, or nothing: a wrong path does not take other things with it.

    Raises:
        ExistsError: names the first.
    """
    for file in read:
        for place, inside in ((target.absolute(), file.absolute()), (target.resolve(), file.resolve())):
            if place == inside or place in inside.parents:
                raise ExistsError(f"{target} holds {file}, which is read; choose another place")
    if target.is_dir() and not any((target / name).exists() for name in _MARKS):
        other = next(target.iterdir(), None)
        if other is not None:
            raise ExistsError(
                f"{target} holds {other.name} and no model or adapter, so it is not replaced; choose another place"
            )


def check_room(target: Path, nbytes: int) -> None:
    """WriteError where the disk has no room for so many bytes."""
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes + _SPARE:
        raise WriteError(f"{target} needs {_size(nbytes)} and {_size(_SPARE)} to spare, and the disk has {_size(free)} left")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


@contextmanager
def _said(target: Path, temporary: Path) -> Iterator[None]:
    """A disk that is full, or takes no more, is told as such: the system's errors name no file, or the temporary one."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ValueError) or (error.filename is not None and temporary.name not in str(error.filename)):
            raise
        reason = error.strerror or f"{error} (is the disk full?)"
        raise WriteError(f"{target} could not be written: {reason}; what was there before is as it was") from error


def _remove_leftovers(target: Path) -> None:
    """Removes what a killed process left beside `target` when it wrote that; what can't be removed, or may be the only whole
    copy, is told. What is being written now is locked by its process, however long that takes."""
    mine = re.compile(re.escape(f"{TEMPORARY_PREFIX}{target.name}-") + r"(old-)?\d+")
    for entry in target.parent.glob(f"{TEMPORARY_PREFIX}*"):
        found = mine.fullmatch(entry.name)
        if found is None or entry.is_symlink():
            continue
        try:
            if found[1] and not target.exists():  # killed between two renames
                raise OSError(f"it is what {target.name} was before")
            with _locked(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except (BlockingIOError, FileNotFoundError):  # another process is at it
            continue
        except OSError as error:
            logger.warning("%s is left over from a conversion that was killed, and stays: %s", entry, error.strerror or error)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file or folder against `_remove_leftovers` of other processes; the lock ends with this one, however it ends.

    Raises:
        BlockingIOError: another process holds it. OSError: the file system knows no locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _being_written(temporary: Path) -> Iterator[None]:
    """`_locked` where that can be: where it can't, nobody can lock what is left over either, and it stays."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(temporary))
        yield


@contextmanager
def whole_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it when the block ends well, and is removed when it does not.

    Every file is flushed to disk before the rename, and the parent folder after it.

    Raises:
        ExistsError: as `check_target`; nothing is written.
        WriteError: the disk is full.
        ForeignError: the folder that it is to lie in can't be written.
    """
    target = Path(target)
    check_target(target, folder=True, overwrite=overwrite)
    check_writable_folder(target.parent, f"the folder of {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _said(target, temporary):
            temporary.mkdir()
            with _being_written(temporary):
                yield temporary
                for file in sorted(temporary.rglob("*")):
                    if file.is_file():
                        flush(file)
                flush(temporary)
                old = _move_aside(target) if target.exists() else None
                temporary.rename(target)
                flush(target.parent)
                if old is not None:
                    shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def write_whole(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`whole_folder` of one file: a temporary file's path, which becomes `target` when the block ends well.

    Raises:
        ExistsError: as `check_target`; nothing is written. WriteError: the disk is full.
    """
    check_target(target, folder=False, overwrite=overwrite)
    check_writable_folder(target.parent, f"the folder of {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}")
    try:
        with _said(target, temporary):
            temporary.touch()
            with _being_written(temporary):
                yield temporary
                flush(temporary)
                temporary.replace(target)
                flush(target.parent)
    finally:
        with suppress(OSError):  # a name that is too long to be one
            temporary.unlink()


def remove_folder(folder: Path) -> None:
    """Deletes a folder so that a crash in between leaves no half of it under its own name."""
    if folder.exists():
        shutil.rmtree(_move_aside(folder))


def _move_aside(folder: Path) -> Path:
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}-old-{os.getpid()}")
    folder.rename(doomed)
    return doomed


def write_text(file: Path, text: str) -> None:
    """Replaces a file's text whole."""
    temporary = file.with_name(f"{TEMPORARY_PREFIX}{file.name}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(file)


def flush(path: Path) -> None:
    """Waits until a file's (or folder's) content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def present_size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def parse_size(size: int | str) -> int:
    """Bytes of a number, or of a text such as "5GB" or "512MiB".

    Raises:
        ValueError: it is neither, or not positive.
    """
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", size.upper()) if isinstance(size, str) else None
    if match is None or float(match[1]) == 0:
        raise ValueError(f"a size must look like '5GB'; got {size!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])
