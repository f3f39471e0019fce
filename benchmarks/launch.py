"""Runs contenders one after another, each in a process of its own, and gathers what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Entry
from benchmarks.work import Work
from jaxsloth.backend import DtypeName

ROOT = Path(__file__).parents[1]


@dataclass
class Started:
    """A contender whose process imports its libraries and then waits; `process` is None where something is missing."""

    about: dict[str, Any]
    own: tempfile.TemporaryDirectory[str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def ready(self) -> Path:
        """A file that is there once all is imported, or will never be."""
        return Path(self.own.name) / "ready"

    def finish(self, timeout: float, quiet: Started | None = None) -> dict[str, Any]:
        """Lets it go on to the GPU; its timed steps wait until `quiet` has imported what it needs.

        What it measured, or {"error": the last line of what it said}; always with "label" and "contender".
        """
        if self.process is None:
            self.own.cleanup()
            return self.about
        folder = Path(self.own.name)
        awaited = quiet.ready if quiet is not None and quiet.process is not None else ""
        with self.own:
            try:
                self.process.communicate(f"{awaited}\n".encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                return self.about | {"error": f"not done after {timeout:.0f} s", "log": _tail(folder / "log")}
            code = self.process.returncode
            if code != 0:
                lines = _tail(folder / "log")
                return self.about | {"error": _last_line(lines, code), "log": lines}
            return self.about | json.loads((folder / "result.json").read_text(encoding="utf-8"))


def start_entry(
    entry: Entry, work: Work, folder: Path, scratch: Path, *, gradients: Path | None = None, profile: bool = False
) -> Started:
    """The entry's worker in a process of its own, that takes no GPU before `Started.finish`."""
    about: dict[str, Any] = {"label": entry.label, "contender": entry.contender.name, "checkpointing": work.checkpointing}
    own = tempfile.TemporaryDirectory(dir=scratch)
    missing = entry.contender.missing()
    if missing:
        return Started(about | {"error": f"{', '.join(missing)} is not installed"}, own)
    place = Path(own.name)
    task = {
        "contender": entry.contender.name,
        "work": work.to_json(),
        "folder": str(folder),
        "result": str(place / "result.json"),
        "ready": str(place / "ready"),
        "gradients": None if gradients is None else str(gradients),
        "profile": profile,
        "started": time.time(),
    }
    (place / "task.json").write_text(json.dumps(task), encoding="utf-8")
    with (place / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(place / "task.json")],
            cwd=place,
            env=_environment(work, scratch),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    return Started(about, own, process)


def run_entry(
    entry: Entry,
    work: Work,
    folder: Path,
    scratch: Path,
    *,
    gradients: Path | None = None,
    profile: bool = False,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """`start_entry` and `Started.finish` in one."""
    return start_entry(entry, work, folder, scratch, gradients=gradients, profile=profile).finish(timeout)


def _import_folder(scratch: Path) -> Path:
    """A folder that holds nothing but links to these two packages: the checkout's own root also holds `kernels`, a name that
    transformers, bitsandbytes and Unsloth look for and take for Hugging Face's."""
    folder = scratch / "imports"
    folder.mkdir(exist_ok=True)
    for name in ("benchmarks", "jaxsloth"):
        link = folder / name
        if not link.is_symlink() or link.readlink() != ROOT / name:
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / name)
    return folder


def worker_environment(scratch: Path) -> dict[str, str]:
    """A worker starts in an empty folder (Unsloth writes where it stands), so import paths must be whole."""
    paths = [
        str(_import_folder(scratch).absolute()),
        *(str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path),
    ]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _environment(work: Work, scratch: Path) -> dict[str, str]:
    environment = worker_environment(scratch)
    if work.memory_limit is not None:
        total = device_memory()
        if total is not None:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{min(work.memory_limit / total, 0.98):.4f}"
    return environment


def device_memory() -> int | None:
    """Bytes of the first GPU, asked of nvidia-smi so that this process takes none of them; None without a GPU."""
    value = nvidia_smi("memory.total")
    return None if value is None else int(value.split()[0]) << 20


def nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip()


def default_dtype() -> DtypeName:
    """bfloat16 on a GPU; float32 on a CPU, which has no fast bf16."""
    return "bfloat16" if nvidia_smi("name") is not None else "float32"


def _tail(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-60:]


def _last_line(lines: list[str], code: int) -> str:
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if "Error" in line.split(":")[0]]
    return f"exit {code}: {(errors or said or ['nothing was said'])[-1][:300]}"
