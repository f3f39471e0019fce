"""Environments that hold exactly what an extra installs, made of links to this one's packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


class Environment:
    """A folder of packages and no other, for `python -S` with this project's source. names: its distributions."""

    def __init__(self, folder: Path, extras: tuple[str, ...]) -> None:
        self.names = closure(extras)
        self._folder = folder
        _link(folder, self.names)

    def run(self, *arguments: str, timeout: int = 800, **variables: str) -> subprocess.CompletedProcess[str]:
        """``python ARGUMENTS``, in a folder of its own beside the packages."""
        work = self._folder.with_name(f"{self._folder.name}-work")
        work.mkdir(exist_ok=True)
        python_path = os.pathsep.join((str(ROOT), str(self._folder)))
        found = os.environ | {"PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"} | variables
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=found, cwd=work, timeout=timeout)


def extras_of_project() -> dict[str, list[str]]:
    """An extra's requirements, and under "" those of the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def closure(extras: tuple[str, ...]) -> set[str]:
    """The distributions, by normalized name, that pip installs for the project with these extras, as their metadata say."""
    own = extras_of_project()
    found: set[tuple[str, str]] = set()
    pending = [Requirement(text) for extra in ("", *extras) for text in own[extra]]
    while pending:
        requirement = pending.pop()
        name = _normalized(requirement.name)
        if name == "jaxsloth":
            pending.extend(Requirement(text) for extra in requirement.extras for text in own[extra])
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            for text in distribution(name).requires or ():
                inner = Requirement(text)
                if inner.marker is None or inner.marker.evaluate(dict(default_environment()) | {"extra": extra}):
                    pending.append(inner)
    return {name for name, _ in found}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def _installed() -> tuple[dict[str, Distribution], dict[str, set[str]]]:
    """(this environment's distributions by name, which of them have files under each top-level name)."""
    found = {_normalized(one.metadata["Name"]): one for one in distributions()}
    owners: dict[str, set[str]] = defaultdict(set)
    for name, one in found.items():
        for file in one.files or ():
            owners[file.parts[0]].add(name)
    return found, owners


def _link(folder: Path, names: set[str]) -> None:
    """Links every top-level file and folder of the distributions; one that a stranger has files in is made file by file."""
    installed, owners = _installed()
    folder.mkdir(parents=True)
    for found in (installed[name] for name in names):
        for file in found.files or ():
            top = file.parts[0]
            if top in ("..", "__pycache__"):  # scripts, and what is compiled of single files
                continue
            part = Path(top) if owners[top] <= names else Path(file)
            target = folder / part
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(Path(str(found.locate_file(part))).resolve())
