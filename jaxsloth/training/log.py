"""The run's log: one JSON object a line, and nothing twice however often the run was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxsloth.convert.files import write_text

Entry = dict[str, Any]


class RunLog:
    """``log.jsonl`` of a run. A training entry has step, loss, learning_rate, grad_norm, tokens and seconds so far (of
    training: evaluations and saves are left out), and tokens_per_s, the tokens since the entry before by the seconds since; an
    evaluation has step, eval_loss and eval_tokens."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Keeps the entries up to resume_step, and drops those that a killed run wrote after its last checkpoint."""
        self.file = file
        kept = [entry for entry in read_log(file) if entry["step"] <= resume_step] if file.exists() else []
        self.entries: list[Entry] = kept
        write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, entry: Entry) -> None:
        self.entries.append(entry)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(file: Path) -> list[Entry]:
    """The entries of a log; a last line that a kill cut short is left out."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
