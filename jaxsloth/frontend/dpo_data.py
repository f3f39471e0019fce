"""Preference rows as trl.DPOTrainer takes them → pairs of examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from jaxsloth.data.encode import Example
from jaxsloth.data.errors import DataError, first_few
from jaxsloth.data.formats import Conversation, row_reader
from jaxsloth.data.templates import ChatTemplate
from jaxsloth.foreign import check_text
from jaxsloth.frontend.rows import as_row
from jaxsloth.frontend.sft_data import Row, ended, read_rows, shared_length, tokenize
from jaxsloth.recipe import DataRecipe

logger = logging.getLogger("jaxsloth.training")
ANSWERS = ("chosen", "rejected")
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
Pair = tuple[np.ndarray, np.ndarray]


def encode_pairs(
    dataset: Iterable[Row], tokenizer: Any, args: Any, max_length: int | None, vocab: int, name: str, limit: int | None = None
) -> tuple[list[Example], dict[Example, float]]:
    """Tokenizes as TRL does: the chosen and the rejected answer of each row, one after the other, each behind the prompt.

    A row is prompt, chosen and rejected: texts, which end in the EOS, or messages, which are rendered with the row's
    chat_template_kwargs. Without a prompt (or with a text, where the answers are messages) it is what both answers begin with.
    An answer begins where the tokens of its prompt end, or differ.

    Args:
        args: its truncation_mode, max_prompt_length (prompts keep their last tokens) and precompute_ref_log_probs.
        limit: how many rows are read at most.
        max_length: rows are cut there, at their end or, with keep_end, at their beginning; with keep_start, rows whose prompt
            alone is as long are left out. None: not at all.

    Returns:
        The examples, 2i and 2i + 1 of one row; and what the columns ref_chosen_logps and ref_rejected_logps say of them, where
        they are there and asked for.

    Raises:
        DataError: no rows, a row that can't be read (says which), no chosen and rejected (lists the fields that are there),
            tokens outside the vocabulary, or no row from which anything is learnt.
    """
    rows = [as_row(row, name, number) for number, row in enumerate(islice(dataset, limit))]
    if not rows:
        raise DataError(f"{name} has no rows; at least one is needed")
    missing = [field for field in ANSWERS if field not in rows[0]]
    if missing:
        raise DataError(
            f"{name} needs the fields chosen and rejected (texts or messages), and perhaps prompt; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing, and its fields are: {', '.join(rows[0])}"
        )
    read = _reader(tokenizer, args.max_prompt_length)
    examples: list[Example] = []
    known: dict[Example, float] = {}
    left_out = []
    cut = slice(-max_length, None) if max_length and args.truncation_mode == "keep_end" else slice(max_length)
    for number, pair in enumerate(read_rows(rows, name, vocab, read)):
        prompt = min(len(learn) - int(np.count_nonzero(learn)) for _, learn in pair)
        own = [Example(tokens[cut], learn[cut]) for tokens, learn in pair]
        if not any(example.targets for example in own) or (cut.start is None and prompt >= (max_length or prompt + 1)):
            left_out.append(number)
            continue
        examples += own
        if args.precompute_ref_log_probs and all(rows[number].get(column) is not None for column in REFERENCES):
            known |= {example: float(rows[number][column]) for example, column in zip(own, REFERENCES, strict=True)}
    if not examples:
        raise DataError(f"nothing is learnt from any of the {len(rows)} rows of {name}: no answer begins within {max_length=}")
    if left_out:
        count = len(left_out)
        logger.warning("%s: %d rows are left out, as no answer begins within them: %s", name, count, first_few(left_out))
    return examples, known


def _reader(tokenizer: Any, max_prompt_length: int | None) -> Callable[[Row], list[Pair]]:
    template: list[ChatTemplate] = []  # made when a row needs it: texts need none
    messages = row_reader(DataRecipe(path="in memory", format="prompt_completion"), {"prompt": "", "completion": ""})

    def conversational(row: Row) -> tuple[np.ndarray, list[np.ndarray]]:
        chat = template[0] if template else ChatTemplate(tokenizer)
        template[:] = [chat]
        prompt, wholes = "", []
        for field in ANSWERS:
            conversation = messages({**row, "completion": row[field]})
            assert isinstance(conversation, Conversation)
            settings = conversation.settings
            chat.check_roles(conversation.messages, settings)
            before = conversation.messages[: conversation.first_learnt]
            prompt = chat.render(before, answer_follows=True, settings=settings)
            wholes.append(_plain(chat.render(conversation.messages, settings=settings), tokenizer))
        return _plain(prompt, tokenizer), wholes

    def read(row: Row) -> list[Pair]:
        row = _with_prompt(row)
        if isinstance(row["prompt"], str):
            if row.get("tools"):
                raise DataError(
                    "the row has tools, and no template renders texts; give messages, or write them into the prompt"
                )
            prompt = tokenize(row["prompt"], tokenizer)
            wholes = [tokenize(row["prompt"] + ended(row[field], tokenizer), tokenizer) for field in ANSWERS]
        else:
            prompt, wholes = conversational(row)
        start = min(shared_length(prompt, whole) for whole in wholes)
        first = max(0, start - max_prompt_length) if max_prompt_length else 0
        return [(whole[first:], np.arange(first, len(whole)) >= start) for whole in wholes]

    return read


def _plain(text: str, tokenizer: Any) -> np.ndarray:
    """The tokens of what a template wrote, which has every special token that it wants."""
    return np.array(tokenizer(check_text(text, DataError), add_special_tokens=False)["input_ids"], np.int32)


def _with_prompt(row: Row) -> dict[str, Any]:
    """The row with its prompt, all three of one kind: texts, or messages."""
    answers: list[Any] = [row.get(field) for field in ANSWERS]
    kinds = {type(answer) for answer in answers}
    if kinds not in ({str}, {list}) or not all(answers if kinds == {list} else [True]):
        came = " and ".join(type(answer).__name__ for answer in answers)
        raise DataError(f"chosen and rejected must both be texts, or both lists of messages, got {came}")
    prompt = row.get("prompt")
    if isinstance(prompt, str | list) and type(prompt) in kinds:
        return dict(row)
    if prompt is not None and not (isinstance(prompt, str) and kinds == {list}):
        raise DataError(f"prompt must be of the kind of its answers (texts, or messages), got {type(prompt).__name__}")
    chosen, rejected = answers
    start = _first_difference(chosen, rejected)
    return {**row, "prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def _first_difference(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Where two answers part, a space before it counted to them; where one goes on from the other, at the last that they share,
    so that neither is empty (TRL's rule)."""
    shortest = min(len(chosen), len(rejected))
    for place in range(shortest):
        if chosen[place] != rejected[place]:
            return place - (place > 0 and chosen[place - 1] == " ")
    return max(shortest - 1, 0)
