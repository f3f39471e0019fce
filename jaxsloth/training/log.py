"""The run's log: one JSON object a line, and nothing twice however often the run was interrupted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from jaxsloth.convert.files import write_text
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import ForeignError, decoded, parse_json, read_bytes

logger = logging.getLogger("jaxsloth.training")

Entry = dict[str, Any]
_LOG_BYTES = 1 << 34


class RunLog:
    """``log.jsonl`` of a run. A training entry has step, loss, learning_rate, grad_norm, tokens and seconds so far (of
    training: evaluations and saves are left out), and tokens_per_s, the tokens since the entry before by the seconds since; an
    evaluation has step, eval_loss and eval_tokens."""

    def __init__(self, file: Path, resume_step: int) -> None:
        """Keeps the entries up to resume_step, and drops those that a killed run wrote after its last checkpoint."""
        self.file = file
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file} must be the run's log, and is a folder; move it away")
        kept = [entry for entry in read_log(file) if entry["step"] <= resume_step] if file.exists() else []
        self.entries: list[Entry] = kept
        write_text(file, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, entry: Entry) -> None:
        self.entries.append(entry)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_log(file: Path) -> list[Entry]:
    """The entries of a log, up to the first line that is none: what a kill cut short, or a disk made of the rest."""
    found: list[Entry] = []
    *lines, last = read_bytes(file, CheckpointError, _LOG_BYTES).split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(decoded(line, file), file)
        except ForeignError:
            entry = None
        step = entry.get("step") if isinstance(entry, dict) else None
        if entry is None or not isinstance(step, int):
            logger.warning("%s: line %d is no entry; it and the %d after it are left out", file, number, len(lines) - number)
            break
        found.append(entry)
    del last  # not ended by a line break: perhaps cut short
    return found
