"""A recipe's data, from files to examples."""

from __future__ import annotations

from typing import Any

from jaxsloth.data.encode import Example, encode_rows
from jaxsloth.data.order import split_rows
from jaxsloth.data.sources import is_file_path, load_rows
from jaxsloth.recipe import DataRecipe


def prepare(
    data: DataRecipe, tokenizer: Any, seed: int, vocab_size: int | None = None
) -> tuple[list[Example], list[Example] | None]:
    """Loads, encodes and splits: (examples to train on, held-out examples or None).

    Held-out rows come from validation_path (a file, or the split "validation" of a data set), or are validation_fraction of
    the rows, chosen by the seed. limit counts the rows of path before that split.

    Raises:
        DataError: whatever `load_rows` and `encode_rows` refuse.
    """
    examples = encode_rows(load_rows(data.path, data.split, data.limit), tokenizer, data, vocab_size)
    if data.validation_path is not None:
        split = "train" if is_file_path(data.validation_path) else "validation"
        return examples, encode_rows(load_rows(data.validation_path, split), tokenizer, data, vocab_size)
    if data.validation_fraction > 0:
        train, held_out = split_rows(len(examples), data.validation_fraction, seed)
        return [examples[i] for i in train], [examples[i] for i in held_out]
    return examples, None
