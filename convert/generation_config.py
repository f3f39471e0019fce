"""A checkpoint's generation_config.json: how its makers mean it to answer, and which tokens end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import Schema, read_object, validated
from jaxsloth.models.config import TokenIds, token_ids

FILE = "generation_config.json"


class _Fields(Schema):
    """What is read here; transformers reads the others."""

    eos_token_id: TokenIds | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_generation_config(folder: Path, vocab: Any) -> dict[str, Any]:
    """The file's fields; none where there is no file. vocab: the config's vocab_size, looked at where it is a number.

    Raises:
        CheckpointError: it is not a JSON object, a field that is read here is wrong, or an end is outside the vocabulary.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    fields = read_object(file, CheckpointError)
    ends = token_ids(validated(_Fields, fields, file, CheckpointError).eos_token_id)
    outside = [end for end in ends if isinstance(vocab, int) and end >= vocab]
    if outside:
        raise CheckpointError(f"{file}: eos_token_id must be below vocab_size ({vocab}), got {outside[0]}")
    return fields
