"""Rows as trl.SFTTrainer takes them → examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from jaxsloth.data.encode import Example
from jaxsloth.data.errors import DataError, first_few
from jaxsloth.data.formats import Conversation, Tokens, row_reader
from jaxsloth.data.packing import BUFFER, pack
from jaxsloth.data.templates import ChatTemplate
from jaxsloth.foreign import check_text
from jaxsloth.frontend.rows import as_row
from jaxsloth.recipe import DataRecipe

logger = logging.getLogger("jaxsloth.training")
Row = Mapping[str, Any]
Formatting = Callable[[Any], Any]
Encoded = tuple[np.ndarray, np.ndarray]


def encode(
    dataset: Iterable[Row],
    tokenizer: Any,
    args: Any,
    max_length: int | None,
    formatting: Formatting | None,
    vocab: int,
    name: str,
    limit: int | None = None,
) -> list[Example]:
    """Tokenizes as TRL does: one example a row (rows whose labels are all masked are left out, with a warning).

    A row is, in this order: input_ids with perhaps labels, attention_mask, completion_mask and assistant_masks (padding is
    cut off where the mask says so); what `formatting` writes; the text of args.dataset_text_field; messages or conversations;
    prompt and completion (texts, or messages). Messages are rendered with the row's chat_template_kwargs. Texts end in the
    EOS, which is learnt also where it is the padding token.

    Args:
        args: its dataset_text_field, completion_only_loss (None: where there are completions) and assistant_only_loss.
        max_length: rows are cut there; None: not at all.
        limit: how many examples there are at most; no row behind them is read. Packed rows are counted as they are packed.

    Raises:
        DataError: no rows, a row that can't be read (says which), none of the fields (lists those that are there), labels
            of the wrong length, tokens outside the vocabulary, or rows of which nothing at all is learnt.
    """
    rows = (as_row(row, name, number) for number, row in enumerate(dataset))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name} has no rows; at least one is needed")
    read = _reader(first, tokenizer, args, formatting)
    kept: list[Example] = []
    without: list[int] = []
    number, packed, full = -1, 0, max_length or args.max_length
    for number, [(tokens, learn)] in enumerate(read_rows(chain([first], rows), name, vocab, lambda row: [read(row)])):
        example = Example(tokens[:max_length], learn[:max_length])
        if not example.learn.any():
            without.append(number)
            continue
        kept.append(example)
        if limit is None or not args.packing or not full:
            packed = len(kept)
        elif len(kept) % BUFFER == 0:  # documents are packed a buffer at a time
            packed += len(pack([len(e.tokens) for e in kept[-BUFFER:]], full))
        if limit is not None and packed >= limit:
            break
    if not any(example.targets for example in kept):
        cut = "" if max_length is None else f" within max_length={max_length}"
        raise DataError(f"nothing is learnt from any of the {number + 1} rows of {name}{cut}: every label is masked")
    if without:
        logger.warning("%s: nothing is learnt from %d rows, which are left out: %s", name, len(without), first_few(without))
    return kept


def read_rows(
    rows: Iterable[Row], name: str, vocab: int, read: Callable[[Row], Sequence[Encoded]]
) -> Iterator[Sequence[Encoded]]:
    """What `read` makes of each row: one or several documents' tokens, with which of them are learnt.

    Raises:
        DataError: `read` raised one, or a token is outside the vocabulary; the message says in which row.
    """
    for number, row in enumerate(rows):
        try:
            found = read(row)
        except DataError as error:
            raise DataError(f"{name}, row {number} (counted from 0): {error}") from error
        for tokens, _ in found:
            if len(tokens) and int(tokens.max()) >= vocab:
                raise DataError(
                    f"{name}, row {number} (counted from 0) holds the token {int(tokens.max())}, and the model has {vocab}; "
                    "the tokenizer must be the model's own"
                )
        yield found


def _reader(first: Row, tokenizer: Any, args: Any, formatting: Formatting | None) -> Callable[[Row], Encoded]:
    field = args.dataset_text_field
    if "input_ids" in first:
        return _read_tokens
    if formatting is not None:
        write = _one_by_one(formatting, first)
        return lambda row: _text(write(row), tokenizer)
    if field in first:
        return lambda row: _text(row.get(field), tokenizer)
    template: list[ChatTemplate] = []  # made when a row needs it: texts need none

    def chat(conversation: Conversation, only_answers: bool) -> Encoded:
        if not template:
            template.append(ChatTemplate(tokenizer))
        return template[0].encode(conversation, only_answers)

    if "messages" in first or "conversations" in first:
        read = row_reader(DataRecipe(path="in memory", format="messages"), first)
        return lambda row: chat(_conversation(read(row)), args.assistant_only_loss)
    if "prompt" in first and "completion" in first:
        only_completion = args.completion_only_loss is not False
        if isinstance(first["prompt"], str):
            return lambda row: _prompt_completion(row, tokenizer, only_completion)
        read = row_reader(DataRecipe(path="in memory", format="prompt_completion"), first)
        return lambda row: chat(_conversation(read(row)), only_completion)
    raise DataError(
        f"the data set has no field {field!r} (dataset_text_field) and none of input_ids, messages, conversations, or prompt "
        f"with completion; its fields are: {', '.join(first)}. Name the text's field, or give a formatting_func"
    )


def _conversation(content: Any) -> Conversation:
    assert isinstance(content, Conversation)
    return content


def _one_by_one(formatting: Formatting, first: Row) -> Callable[[Row], Any]:
    """A formatting function as one of a single row. Older notebooks' take a batch of columns and return a list."""
    try:
        batch = formatting({name: [value] for name, value in first.items()})
    except Exception:  # a user's function of one row may fail in any way on columns
        return formatting
    if isinstance(batch, list) and len(batch) == 1 and isinstance(batch[0], str):
        return lambda row: formatting({name: [value] for name, value in row.items()})[0]
    return formatting


def _text(text: Any, tokenizer: Any) -> Encoded:
    if not isinstance(text, str):
        raise DataError(f"a text must be a string, got {type(text).__name__} (of the text's field or formatting_func)")
    tokens = tokenize(ended(text, tokenizer), tokenizer)
    return tokens, np.ones(len(tokens), bool)


def _prompt_completion(row: Row, tokenizer: Any, only_completion: bool) -> Encoded:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError("prompt and completion must both be texts, as in the first row")
    before = tokenize(prompt, tokenizer)
    tokens = tokenize(prompt + ended(completion, tokenizer), tokenizer)
    return tokens, (np.arange(len(tokens)) >= shared_length(before, tokens)) | (not only_completion)


def shared_length(before: np.ndarray, tokens: np.ndarray) -> int:
    """How many tokens both begin with: tokens of a prompt may merge with what follows it."""
    shared = min(len(before), len(tokens))
    differing = np.flatnonzero(before[:shared] != tokens[:shared])
    return int(differing[0]) if differing.size else shared


def ended(text: str, tokenizer: Any) -> str:
    """The text, with the EOS behind it."""
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def tokenize(text: str, tokenizer: Any) -> np.ndarray:
    """int32 ``[length]``, with the special tokens that the tokenizer puts around a text."""
    # A text that a chat template wrote begins with BOS already.
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return np.array(tokenizer(check_text(text, DataError), add_special_tokens=not begins)["input_ids"], np.int32)


def _read_tokens(row: Row) -> Encoded:
    fields = {name: row[name] for name in ("input_ids", "labels") if row.get(name) is not None}
    content = row_reader(DataRecipe(path="in memory"), fields)(fields)
    assert isinstance(content, Tokens)
    tokens, learn = content.tokens, content.learn.copy()
    if row.get("labels") is None:
        for name in ("completion_mask", "assistant_masks"):
            if row.get(name) is not None:
                learn &= _mask(row[name], name, len(tokens))
    if row.get("attention_mask") is not None:
        real = _mask(row["attention_mask"], "attention_mask", len(tokens))
        tokens, learn = tokens[real], learn[real]
    return tokens, learn


def _mask(value: Any, name: str, length: int) -> np.ndarray:
    mask = np.asarray(value) != 0
    if mask.shape != (length,):
        raise DataError(f"{name} must be as long as input_ids ({length}), and it has {mask.size} values")
    return mask
