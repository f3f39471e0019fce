"""Batches that a user's own collator makes, as the arrays of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsloth.batch import FIELDS, IGNORE, Batch, StepBatch
from jaxsloth.data.encode import Example
from jaxsloth.data.errors import DataError
from jaxsloth.data.step_batches import StepBatches, empty_batch, round_up

Row = dict[str, list[int]]
_FIELDS = ("input_ids", "labels", "attention_mask", "position_ids")
# What collators that pack say beside position_ids, which say the same.
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class Collator:
    """A collator's batches: each of its rows cut to its real tokens, and padded on the right with the others.

    The collator is given rows as transformers' collators get them: input_ids and attention_mask, and labels where a set has
    labels that are masked. What it returns counts as in transformers: labels are shifted here; without them every real token
    is learnt; a mask says which tokens are real; without one, a row holds several documents where position_ids do not go on by
    one.
    """

    def __init__(self, collate: Callable[[list[Row]], Any], vocab: int, pad_to_multiple_of: int, devices: int) -> None:
        self._collate, self._vocab, self._multiple, self._devices = collate, vocab, pad_to_multiple_of, devices

    def batches(self, groups: Sequence[Sequence[Example]], labelled: bool) -> list[Batch]:
        """A batch of every group of examples, all of one shape; rows are counted along them.

        Raises:
            DataError: the collator returned something else than the class says.
        """
        made = [self._rows(self._collate([_given(example, labelled) for example in group])) for group in groups]
        longest = max(len(row[0]) for rows in made for row in rows)
        length, count = round_up(longest, self._multiple), round_up(max(map(len, made)), self._devices)
        found, first = [], 0
        for rows in made:
            batch = empty_batch((count,), length)
            for place, row in enumerate(rows):
                for array, values in zip((batch.input_ids, batch.targets, batch.segments, batch.positions), row, strict=True):
                    array[place, : len(values)] = values
                batch.rows[place] = first + place
            found.append(batch)
            first += len(rows)
        return found

    def _rows(self, made: Any) -> list[tuple[np.ndarray, ...]]:
        """(tokens, targets, segments, positions) of every row that has a token."""
        arrays = self._arrays(made)
        ids, mask = arrays["input_ids"], arrays.get("attention_mask")
        real = np.ones(ids.shape, bool) if mask is None else mask != 0
        labels = arrays.get("labels", np.where(real, ids, IGNORE))
        rows = []
        for index in np.flatnonzero(real.any(1)):
            kept = real[index]
            tokens, learnt = ids[index, kept], labels[index, kept]
            positions, segments = np.arange(len(tokens)), np.ones(len(tokens), int)
            if "position_ids" in arrays:
                positions = arrays["position_ids"][index, kept]
                if mask is None:
                    segments += np.cumsum(np.diff(positions, prepend=positions[0] - 1) != 1)
            rows.append((tokens, np.append(learnt[1:], IGNORE), segments, positions))
        if not rows:
            raise DataError(
                "data_collator returned a batch without a token; every batch must have one that attention_mask keeps"
            )
        return rows

    def _arrays(self, made: Any) -> dict[str, np.ndarray]:
        if not isinstance(made, Mapping) or "input_ids" not in made:
            got = f"one with {', '.join(made)}" if isinstance(made, Mapping) else type(made).__name__
            raise DataError(f"data_collator must return a dict with input_ids, got {got}")
        arrays = {name: np.asarray(made[name]) for name in _FIELDS if made.get(name) is not None}
        strange = [name for name in made if name not in (*_FIELDS, *(_PACKING if "position_ids" in arrays else ()))]
        if strange:
            raise DataError(
                f"data_collator returned {', '.join(strange)}, which nothing here reads; let it return of {', '.join(_FIELDS)} "
                "what there is (packed batches: position_ids)"
            )
        shape = arrays["input_ids"].shape
        if len(shape) != 2:
            raise DataError(f"data_collator must return input_ids [batch, length], and their shape is {list(shape)}")
        if "position_ids" in arrays:
            arrays["position_ids"] = np.broadcast_to(arrays["position_ids"], shape)
        for name, array in arrays.items():
            if array.shape != shape:
                raise DataError(f"data_collator must return {name} like input_ids, {list(shape)}, got {list(array.shape)}")
        labels = arrays.get("labels", np.full(1, IGNORE))
        for name, array in (("input_ids", arrays["input_ids"]), ("labels", labels[labels != IGNORE])):
            if array.size and not 0 <= array.min() <= array.max() < self._vocab:
                raise DataError(f"data_collator returned {name} outside the model's {self._vocab} tokens (0 and up)")
        return arrays


class CollatedBatches(StepBatches):
    """The step batches of a run whose micro-batches a collator makes, of the rows that a `StepBatches` would take."""

    def __init__(self, collator: Collator, examples: Sequence[Example], **settings: Any) -> None:
        super().__init__(examples, **settings)
        self._collator, self._labelled = collator, has_masked(examples)

    def batch(self, step: int) -> StepBatch:
        chosen = [self._examples[row] for row in self.rows_of(step)]
        groups = [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]
        made = self._collator.batches(groups, self._labelled)
        # The last step of an epoch may be short.
        rows, length = made[0].input_ids.shape
        made += [empty_batch((rows,), length)] * (self.accumulation - len(made))
        arrays = (np.stack([getattr(batch, name) for batch in made]) for name in FIELDS)
        return StepBatch(*arrays, valid_tokens=sum(batch.valid_tokens() for batch in made))


def has_masked(examples: Sequence[Example]) -> bool:
    """Whether something of the set is not to be learnt."""
    return not all(example.learn.all() for example in examples)


def shown(example: Example) -> Row:
    """A row of a set as transformers' trainers hold it."""
    labels = np.where(example.learn, example.tokens, IGNORE).tolist()
    return {"input_ids": example.tokens.tolist(), "attention_mask": [1] * len(labels), "labels": labels}


def _given(example: Example, labelled: bool) -> Row:
    return {name: values for name, values in shown(example).items() if labelled or name != "labels"}
