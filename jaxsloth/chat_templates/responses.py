"""train_on_responses_only: the labels of a trainer's data kept on the answers, masked everywhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsloth.batch import IGNORE
from jaxsloth.chat_templates.parts import AnswerFinder, Parts, find_parts
from jaxsloth.data.encode import Example
from jaxsloth.data.errors import DataError

logger = logging.getLogger("jaxsloth.chat_templates")
_SHOWN_TOKENS = 200
Relabel = Callable[[Mapping[str, Any]], dict[str, list[list[int]]]]


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Lets a trainer learn the answers only, in every turn; what was masked before stays masked.

    Args:
        trainer: this project's SFTTrainer, TRL's, or transformers' Trainer over tokenized data; it is changed and returned.
        instruction_part, response_part: the texts before a question and before an answer, e.g. "<|im_start|>user\\n" and
            "<|im_start|>assistant\\n". Without them they are found in the tokenizer's chat template, and headers of tools and
            system messages with them.
        force_match: line breaks at the ends of the parts must be there too; False looks for the parts without them.
        tokenizer: the trainer's, where None.
        return_function: return the function from a batch (``input_ids``, perhaps ``labels``) to its ``labels`` instead.
        num_proc: processes that map the data set.

    Rows of which nothing is learnt are left out, with a warning.

    Raises:
        DataError: one part without the other, parts that can't be found in the template, data that is not tokenized, or every
            label of a set is masked (with an example, decoded).
    """
    tokenizer = tokenizer or getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if tokenizer is None:
        raise DataError("train_on_responses_only needs the tokenizer, and the trainer has none; pass tokenizer=")
    parts = _parts(tokenizer, instruction_part, response_part, force_match)
    finder = AnswerFinder(tokenizer, parts)
    relabel = _relabel(finder)
    if return_function:
        return relabel
    if hasattr(trainer, "replace_examples"):  # this project's, whose data is tokens already
        held_out = (
            None if trainer.held_out is None else _relabel_examples(trainer.held_out, finder, tokenizer, parts, "eval_dataset")
        )
        trainer.replace_examples(_relabel_examples(trainer.examples, finder, tokenizer, parts, "train_dataset"), held_out)
        return trainer
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        if isinstance(dataset, dict):
            labelled: Any = {
                key: _relabel_dataset(part, relabel, num_proc, tokenizer, parts, f"{name}[{key!r}]")
                for key, part in dataset.items()
            }
        elif dataset is not None:
            labelled = _relabel_dataset(dataset, relabel, num_proc, tokenizer, parts, name)
        else:
            continue
        setattr(trainer, name, labelled)
    _keep_labels(trainer, tokenizer)
    return trainer


def _parts(tokenizer: Any, instruction: str | None, response: str | None, force_match: bool) -> Parts:
    if (instruction is None) != (response is None):
        raise DataError("instruction_part and response_part belong together: give both, or neither to have them found")
    if instruction is None or response is None:
        parts = find_parts(tokenizer)
        logger.info("answers begin after %r and end before %s", parts.response, ", ".join(map(repr, parts.ends)))
    else:
        if not instruction.strip() or not response.strip():
            raise DataError(f"instruction_part and response_part must hold text, got {instruction!r} and {response!r}")
        parts = Parts(response, (instruction,))
    if force_match:
        return parts
    return Parts(parts.response.strip("\n"), tuple(part.strip("\n") for part in parts.ends))


def _relabel(finder: AnswerFinder) -> Relabel:
    def relabel(batch: Mapping[str, Any]) -> dict[str, list[list[int]]]:
        labels = []
        for row, ids in enumerate(batch["input_ids"]):
            tokens = np.asarray(ids, np.int64)
            learn = _find(finder, tokens, batch["seq_lengths"][row] if "seq_lengths" in batch else None)
            if "labels" in batch:
                learn &= np.asarray(batch["labels"][row]) != IGNORE
            if "attention_mask" in batch:  # padding, which may be the token that ends an answer
                learn &= np.asarray(batch["attention_mask"][row]) != 0
            labels.append(np.where(learn, tokens, IGNORE).tolist())
        return {"labels": labels}

    return relabel


def _find(finder: AnswerFinder, tokens: np.ndarray, lengths: Sequence[int] | None) -> np.ndarray:
    """The answers of a row, or of each document of a packed one: none reaches over the end of its document."""
    if lengths is None:
        return finder(tokens)
    documents = np.split(tokens, np.cumsum(lengths)[:-1])
    return np.concatenate([finder(document) for document in documents])


def _relabel_dataset(dataset: Any, relabel: Relabel, num_proc: int | None, tokenizer: Any, parts: Parts, name: str) -> Any:
    columns = dataset.column_names
    if columns is not None and "input_ids" not in columns:
        raise DataError(
            f"{name} must be tokenized: it needs the field input_ids, and it has {', '.join(columns)}. Build the trainer so "
            "that it prepares its data, or tokenize the rows first"
        )
    if not hasattr(dataset, "__len__"):  # streaming: rows come later, so only the mapping is set up
        return dataset.map(relabel, batched=True).filter(_is_learnt, input_columns=["labels"])
    labelled = dataset.map(relabel, batched=True, num_proc=num_proc, desc=f"Masking all but the answers of {name}")
    kept = labelled.filter(_is_learnt, input_columns=["labels"], num_proc=num_proc)
    _check_kept(len(kept), len(labelled), lambda: labelled[0]["input_ids"], tokenizer, parts, name)
    return kept


def _relabel_examples(
    examples: Sequence[Example], finder: AnswerFinder, tokenizer: Any, parts: Parts, name: str
) -> list[Example]:
    labelled = [Example(example.tokens, example.learn & finder(example.tokens)) for example in examples]
    kept = [example for example in labelled if example.targets]
    _check_kept(len(kept), len(labelled), lambda: examples[0].tokens, tokenizer, parts, name)
    return kept


def _is_learnt(labels: Sequence[int]) -> bool:
    return any(label != IGNORE for label in labels[1:])  # the first is never predicted


def _check_kept(kept: int, count: int, example: Callable[[], Any], tokenizer: Any, parts: Parts, name: str) -> None:
    if not kept:
        shown = tokenizer.decode(example()[:_SHOWN_TOKENS])
        raise DataError(
            f"every label of {name} ({count} rows) is masked, so nothing would be learnt: no row holds an answer after "
            f"{parts.response!r} that is not cut off or masked already. Give instruction_part and response_part as they stand "
            f"in the data, or a longer max_length. The first row begins:\n{shown}"
        )
    if kept < count:
        logger.warning("%s: %d of %d rows hold no answer that is learnt, and are left out", name, count - kept, count)


def _keep_labels(trainer: Any, tokenizer: Any) -> None:
    """transformers' language modelling collator makes its own labels, without those that equal the padding token: replaced."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    if isinstance(getattr(trainer, "data_collator", None), DataCollatorForLanguageModeling):
        multiple = trainer.data_collator.pad_to_multiple_of
        trainer.data_collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE, pad_to_multiple_of=multiple)
