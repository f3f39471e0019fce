"""One run an output folder at a time: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxsloth.foreign import check_writable_folder

LOCK = ".running"  # holds the process' id
_held: set[Path] = set()  # by this process, whose own locks do not keep it out


class RunningError(ValueError):
    """Another run is writing to the folder."""


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Holds the folder, which is made where it is not there.

    Raises:
        RunningError: a living process holds it; the message names it.
        ForeignError: it can't be written.
    """
    check_writable_folder(output, "the output folder")
    output.mkdir(parents=True, exist_ok=True)
    path = output.resolve() / LOCK
    _refuse(output, os.getpid() if path in _held else None)
    descriptor = _take(output, path)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_free(output: Path) -> None:
    """That no living run holds the folder, as `lock` does; writes nothing."""
    path = output.resolve() / LOCK
    if path in _held:
        _refuse(output, os.getpid())
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _try(output, descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)  # and with it the lock


def _take(output: Path, path: Path) -> int:
    """The locked file's descriptor; anew where the holder before removed the file meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _try(output, descriptor, fcntl.LOCK_EX)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try(output: Path, descriptor: int, kind: int) -> None:
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what a lock that another process has is told by
        _refuse(output, int(os.pread(descriptor, 20, 0) or b"0"))


def _refuse(output: Path, holder: int | None) -> None:
    if holder is not None:
        raise RunningError(
            f"{output} belongs to a run that has not ended: process {holder or 'that begins now'}; wait for it, end it, or "
            "choose another output folder"
        )
