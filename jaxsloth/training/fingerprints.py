"""What a run's checkpoints belong to: the tokens, the base, the template and the settings that they were trained with."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from jaxsloth.convert.checkpoint import Checkpoint
from jaxsloth.convert.digest import base_digest, values_digest
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.encode import Example
from jaxsloth.foreign import Schema, read_object, shown, validated

logger = logging.getLogger("jaxsloth.training")

FILE = "fingerprints.json"
KINDS = ("data", "base", "template", "recipe", "files")
# What a checkpoint holds by the names of its parts -> in which file.
_FILES = {"adapter": "adapter_model.safetensors", "optimizer": "state.safetensors"}
_PACKAGES = ("jaxsloth", "numpy", "transformers", "tokenizers", "torch", "jax")


class ForeignCheckpointError(CheckpointError):
    """A whole checkpoint, of something else than what is to go on: never passed over, as a broken one is."""


# "adapter" and "optimizer" -> arrays by name, as they are stored.
Parts = Mapping[str, Mapping[str, np.ndarray]]


class Rows(Schema):
    """Rows as tokens. digest: of tokens and of what is learnt, in order; mixture: the same whatever the order."""

    rows: int
    tokens: int
    digest: str
    mixture: int


class Fingerprints(Schema):
    """What a checkpoint belongs to. recipe: the settings that decide numbers, where trainer_state.json holds none; files: what
    its own adapter and optimizer are, which only a checkpoint that was written knows."""

    data: Rows
    held_out: Rows | None = None
    base: str
    template: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)

    def write(self, folder: Path, parts: Parts) -> None:
        """Beside the files of a checkpoint's parts."""
        values = self.model_dump() | {"files": {part: values_digest(arrays) for part, arrays in parts.items()}}
        (folder / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def fingerprints(
    opened: Checkpoint,
    tokenizer: Any,
    template: str | None,
    examples: Sequence[Example],
    held_out: Sequence[Example] | None,
    recipe: Mapping[str, Any] | None = None,
) -> Fingerprints:
    """Those of a run that is about to begin or to go on. template: the recipe's; None is the tokenizer's own."""
    return Fingerprints(
        data=rows_print(examples),
        held_out=rows_print(held_out) if held_out else None,
        base=base_digest(opened),
        template=_template_digest(tokenizer, template),
        recipe=json.loads(json.dumps(dict(recipe or {}), default=str)),
        versions=_versions(),
    )


def rows_print(examples: Sequence[Example]) -> Rows:
    """A row's length goes before its bytes, so that no two ways of cutting rows are alike."""
    digest, tokens, mixture = hashlib.blake2b(digest_size=16), 0, 0
    for example in examples:
        row = np.ascontiguousarray(example.tokens, np.int32).tobytes() + np.ascontiguousarray(example.learn, bool).tobytes()
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row)
        tokens += len(example.tokens)
        mixture = (mixture + zlib.crc32(row) + (len(row) << 32)) & (2**62 - 1)
    return Rows(rows=len(examples), tokens=tokens, digest=digest.hexdigest(), mixture=mixture)


def _template_digest(tokenizer: Any, template: str | None) -> str:
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    text = json.dumps([template or tokenizer.chat_template, special], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_fingerprints(folder: Path) -> Fingerprints | None:
    """A checkpoint's; None where it was saved before there were any."""
    file = folder / FILE
    return validated(Fingerprints, read_object(file, CheckpointError), file, CheckpointError) if file.exists() else None


def foreign_files(saved: Fingerprints, parts: Parts) -> str:
    """What parts of a checkpoint are not those that it was saved with, in words; "" where all are, or nobody noted them."""
    changed = [_FILES[part] for part, noted in saved.files.items() if part in parts and values_digest(parts[part]) != noted]
    if not changed:
        return ""
    return f"{' and '.join(changed)} hold{'s' if len(changed) == 1 else ''} other values than the checkpoint was saved with"


def check_fingerprints(
    folder: Path, now: Fingerprints, parts: Parts, anyway: Collection[str] = (), how: str = "--resume-anyway {kind}"
) -> None:
    """That a checkpoint belongs to what is about to go on, and is whole.

    Args:
        parts: what was read of it.
        anyway: kinds of `KINDS` that may differ.
        how: what lets a kind differ, for the error.

    Raises:
        ForeignCheckpointError: it does not; every difference is named.
    """
    saved = read_fingerprints(folder)
    if saved is None:
        logger.warning("%s has no %s (it is of an older version): whether it belongs to this run is not checked", folder, FILE)
        return
    found = differences(saved, now)
    changed = foreign_files(saved, parts)
    if changed:
        found["files"] = changed
    found = {kind: text for kind, text in found.items() if kind not in anyway}
    if found:
        lines = "".join(f"\n  {text}; to go on all the same: {how.format(kind=kind)}" for kind, text in found.items())
        raise ForeignCheckpointError(f"{folder} does not belong to what is to go on:{lines}")
    others = [
        f"{name} {saved.versions.get(name, 'none')} -> {now.versions.get(name, 'none')}"
        for name in sorted({*saved.versions, *now.versions})
        if saved.versions.get(name) != now.versions.get(name)
    ]
    if others:
        logger.warning("%s was trained with other versions: %s", folder, ", ".join(others))


def differences(saved: Fingerprints, now: Fingerprints) -> dict[str, str]:
    """What differs, by kind, in words."""
    found = {}
    rows = [
        _rows_difference(name, before, after)
        for name, before, after in (("rows", saved.data, now.data), ("held-out rows", saved.held_out, now.held_out))
        if before != after
    ]
    if rows:
        found["data"] = "; ".join(rows)
    if saved.base != now.base:
        found["base"] = f"the base's weights or config.json have changed ({saved.base[:8]} -> {now.base[:8]})"
    if saved.template != now.template:
        found["template"] = f"the chat template or its special tokens have changed ({saved.template[:8]} -> {now.template[:8]})"
    settings = [
        f"{key}: {shown(saved.recipe.get(key))} -> {shown(now.recipe.get(key))}"
        for key in sorted({*saved.recipe, *now.recipe})
        if saved.recipe.get(key) != now.recipe.get(key)
    ]
    if settings:
        found["recipe"] = f"settings have changed: {', '.join(settings)}"
    return found


def _rows_difference(name: str, before: Rows | None, after: Rows | None) -> str:
    if before is None or after is None:
        return f"there are {name} {'no more' if after is None else 'now, and were none'}"
    if before.rows != after.rows:
        return f"the number of {name} has changed ({before.rows} -> {after.rows})"
    if before.mixture == after.mixture:
        return f"the order of the {name} has changed"
    return f"the tokens of the {name} have changed ({before.tokens} -> {after.tokens} in all)"


def check_kinds(kinds: Collection[str], what: str) -> tuple[str, ...]:
    """Names of `KINDS`; CheckpointError names one that is none."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown:
        raise CheckpointError(
            f"{what} must be of {', '.join(KINDS)}, got {shown(kinds if isinstance(kinds, str) else unknown[0])}"
        )
    return tuple(kinds)
