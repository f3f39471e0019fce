"""What is printed, on terminals that can't show every character too."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

_PLAIN = str.maketrans({"→": "->", "×": "x", "…": "...", "≤": "<=", "≥": ">=", "–": "-"})


class Printable:
    """A stream that writes what its encoding has no character for in plain words, or as "?"."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A rich console on this process' stream."""
    return Console(file=Printable(sys.stderr if stderr else sys.stdout), quiet=quiet)  # type: ignore[arg-type]
