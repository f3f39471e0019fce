"""A tiny checkpoint and its rows, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jaxsloth.recipe import Recipe
from tests.support.tiny import tiny_recipe, write_checkpoint, write_rows


@dataclass(frozen=True)
class Tiny:
    model: Path
    rows: Path

    def recipe(self, output: Path, /, **changes: Any) -> Recipe:
        return tiny_recipe(self.model, self.rows, output, **changes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    return Tiny(write_checkpoint(folder / "model"), write_rows(folder / "rows.jsonl"))


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder with what it holds; empty where there is no folder."""
    return lambda folder: {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
