"""Checking an adapter against another of the same base: PEFT applies the one, llama.cpp the other, over the same base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from jaxsloth.convert.adapters import base_of_adapter
from jaxsloth.convert.check import BARS, HARD_TEXTS, LLAMA_CPP, PROMPTS, Checked, added_tokens, compared, stored_as, wider
from jaxsloth.convert.check_readers import MERGED, READERS, Reader
from jaxsloth.convert.checkpoint import Checkpoint, find_checkpoint, resolve_path
from jaxsloth.convert.gguf_adapter import is_gguf_adapter
from jaxsloth.convert.peft_adapter import CONFIG
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.extras import require

_OUTTYPE = "f16"  # of the base that llama.cpp is given, where it is no GGUF file itself


def is_adapter(name: str) -> bool:
    """Whether a path is a PEFT folder or a GGUF file of an adapter."""
    path = Path(name)
    return (path / CONFIG).is_file() or is_gguf_adapter(path)


def check_adapter_possible(*kinds: str) -> None:
    """MissingExtraError where a package is missing that applies adapters of these kinds ("peft", "gguf-lora")."""
    need = {"peft": MERGED.packages, "gguf-lora": READERS["gguf"].packages}
    require("check", "the check", only=[package for kind in kinds for package in need[kind]])


def check_adapter(
    source: str,
    destination: str,
    *,
    base: str | None = None,
    prompts: Sequence[str] = PROMPTS,
    tell: Callable[[str], None] = lambda line: None,
) -> Checked:
    """Runs the base with each of two adapters, by its own ecosystem's reader, and compares; and whether the second moves the
    base as the first does.

    Args:
        source, destination: a PEFT folder or a GGUF file of an adapter.
        base: the model that both belong to; None: what a PEFT folder names. For a GGUF adapter it is written as a temporary
            GGUF file in 16 bits, unless it is one.

    Raises:
        CheckpointError: one of them can't be read, or no base is known. MissingExtraError: a package is missing.
    """
    paths = [resolve_path(name) for name in (source, destination)]
    kinds = ["gguf-lora" if is_gguf_adapter(path) else "peft" for path in paths]
    check_adapter_possible(*kinds)
    named = next((path for path, kind in zip(paths, kinds, strict=True) if kind == "peft"), paths[0])
    found = find_checkpoint(base_of_adapter(str(named), base), to_convert=True)
    texts = (*HARD_TEXTS, *(f"a {token} b{token}" for token in added_tokens(found)[:4]))
    with _base_file(found, needed="gguf-lora" in kinds) as file:
        readers = [_reader(kind, found) for kind in kinds]
        bases = [file if kind == "gguf-lora" else found.path for kind in kinds]
        tell(f"reading {found.path} and {paths[0]} with {readers[0].name}")
        want = readers[0].read(bases[0], paths[0], texts, prompts)
        plain = readers[0].read(bases[0], None, (), want.prompts)
        tell(f"reading {found.path} and {paths[1]} with {readers[1].name}")
        got = readers[1].read(bases[1], paths[1], texts, want.prompts)
        stored = stored_as(find_checkpoint(str(bases[1]), to_convert=True))
        bar = wider(BARS[stored], LLAMA_CPP) if "gguf-lora" in kinds else BARS[stored]
        if found.kind == "gguf" and stored not in ("F32", "F16", "BF16"):
            bar = wider(bar, BARS["Q8_0"])
    return compared((readers[0].name, readers[1].name), (stored, bar), texts, want, got, plain)


def _reader(kind: str, base: Checkpoint) -> Reader:
    if kind == "gguf-lora":
        return replace(READERS["gguf"], name="llama.cpp with its adapter")
    return READERS["orbax"] if base.kind == "orbax" else MERGED


@contextmanager
def _base_file(base: Checkpoint, *, needed: bool) -> Iterator[Path]:
    """The base as a GGUF file."""
    if base.kind == "gguf" or not needed:
        yield base.path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield convert(plan(base.name, Path(folder) / "base.gguf", "gguf", Options(outtype=_OUTTYPE)))
