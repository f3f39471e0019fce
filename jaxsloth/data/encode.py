"""Rows → examples: tokens, and which of them the model learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.progress import track

from jaxsloth.data.errors import DataError, first_few
from jaxsloth.data.formats import Text, Tokens, row_reader
from jaxsloth.data.templates import ChatTemplate
from jaxsloth.foreign import check_text
from jaxsloth.recipe import DataRecipe
from jaxsloth.terminal import console

_MANY_ROWS = 2000


@dataclass(frozen=True, eq=False)
class Example:
    """One document. learn[t]: token t is something that the model must predict (from the tokens before it)."""

    tokens: np.ndarray  # int32 [length]
    learn: np.ndarray  # bool [length]

    @property
    def targets(self) -> int:
        """How many tokens are learnt; the first can't be: nothing is before it."""
        return int(np.count_nonzero(self.learn[1:]))


def encode_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, data: DataRecipe, vocab_size: int | None = None
) -> list[Example]:
    """Tokenizes rows in the recipe's format and template; one example a row, in order.

    Text gets the tokenizer's special tokens (BOS only where it has none) and ends in its EOS; conversations get exactly what
    the template writes. EOS is learnt also where a tokenizer uses it for padding. With truncation, tokens past max_length are
    dropped.

    Args:
        vocab_size: the model's, to check the tokens against.

    Raises:
        DataError: no rows; a row that its format or the template can't read (says which); rows longer than max_length with
            truncation off; rows of which nothing is learnt; tokens outside the vocabulary. Rows count from 0.
    """
    if not rows:
        raise DataError("there are no rows; training needs at least one")
    examples = list(_encode_all(rows, tokenizer, data))
    _check_length(examples, data)
    if data.truncation:
        examples = [Example(e.tokens[: data.max_length], e.learn[: data.max_length]) for e in examples]
    _check_learnt(examples, data)
    if vocab_size is not None:
        _check_vocabulary(examples, vocab_size)
    return examples


def _encode_all(rows: Sequence[Mapping[str, Any]], tokenizer: Any, data: DataRecipe) -> Iterable[Example]:
    read = row_reader(data, rows[0])
    template: ChatTemplate | None = None
    progress = track(
        rows, "Tokenizing", console=console(stderr=True), transient=True, disable=len(rows) < _MANY_ROWS, update_period=0.5
    )
    for number, row in enumerate(progress):
        try:
            content = read(row)
            if isinstance(content, Tokens):
                yield Example(content.tokens, content.learn)
            elif isinstance(content, Text):
                yield _encode_text(content, tokenizer)
            else:
                template = template or ChatTemplate(tokenizer, data.template)
                yield Example(*template.encode(content, data.response_only))
        except DataError as error:
            raise DataError(f"row {number} (counted from 0): {error}") from error


def _encode_text(content: Text, tokenizer: Any) -> Example:
    # A text that a chat template wrote begins with BOS already.
    begins = tokenizer.bos_token is not None and content.text.startswith(tokenizer.bos_token)
    tokens = tokenizer(check_text(content.text, DataError), add_special_tokens=not begins)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None and (not tokens or tokens[-1] != end):
        tokens = [*tokens, end]
    return Example(np.array(tokens, np.int32), np.ones(len(tokens), bool))


def _check_length(examples: Sequence[Example], data: DataRecipe) -> None:
    long = [(number, len(e.tokens)) for number, e in enumerate(examples) if len(e.tokens) > data.max_length]
    if long and not data.truncation:
        longest = max(length for _, length in long)
        shown = first_few([f"row {number} ({length} tokens)" for number, length in long])
        raise DataError(
            f"{len(long)} of {len(examples)} rows are longer than data.max_length={data.max_length}: {shown}. "
            f"Set data.max_length to {longest}, or data.truncation to true, or remove the rows"
        )


def _check_learnt(examples: Sequence[Example], data: DataRecipe) -> None:
    masked = [number for number, e in enumerate(examples) if not e.targets]
    if masked:
        cut = f" within data.max_length={data.max_length}" if data.truncation else ""
        raise DataError(
            f"{len(masked)} of {len(examples)} rows have all labels masked, so nothing is learnt from them{cut}: "
            f"rows {first_few(masked)}. Remove them, raise data.max_length, or set data.response_only to false"
        )


def _check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    outside = [number for number, e in enumerate(examples) if e.tokens.max() >= vocab_size]
    if outside:
        worst = max(int(e.tokens.max()) for e in examples)
        raise DataError(
            f"{len(outside)} of {len(examples)} rows hold tokens that the model lacks (largest id {worst}, vocabulary of "
            f"{vocab_size}): rows {first_few(outside)}. The tokenizer must be the model's own"
        )
