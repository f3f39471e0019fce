"""Examples → the arrays of one optimizer step, for any step: a run's data position is its step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from jaxsloth.batch import IGNORE, PADDING_SEGMENT, Batch, StepBatch
from jaxsloth.data.encode import Example
from jaxsloth.data.errors import DataError, first_few
from jaxsloth.data.order import epoch_order
from jaxsloth.data.packing import pack

FILLER_ROW = -1


class Order(Protocol):
    def __call__(self, count: int, *, epoch: int) -> np.ndarray:
        """int64 ``[count]``, a permutation."""
        ...


class StepBatches:
    """The step batches of a run.

    A step takes `global_rows` = batch_size × accumulation rows; an epoch visits every row once, in an order that the seed and
    the epoch give, and its last step may be short: rows that only fill the shape have segments 0, no targets, and row -1.
    The rows of a step and their order don't depend on how batch_size and accumulation share them out, nor on devices.

    Without packing, a row is an example, and a step batch is as long as its longest row, rounded up to pad_to_multiple_of. With
    packing, a row is whole examples side by side in max_length tokens (rounded up); they are packed once, in the first
    epoch's order, so that every epoch has the same rows, in its own order.

    Args:
        examples: what is learnt; each at most max_length tokens.
        batch_size: rows of a micro-batch, over all devices.
        accumulation: micro-batches of a step.
        devices: the batch axis is padded with filler rows to a multiple of it.
        order: (number of rows, epoch) -> the order in which the epoch visits them, in place of the seed's.
        group_size: this many examples in a row (a pair of answers: 2) are visited as one, and stand in consecutive rows of one
            micro-batch; order then counts them. Rows stay rows: batch_size and len(examples) are multiples of it.

    Raises:
        DataError: no examples, or one is longer than max_length.
        ValueError: batch_size, or the number of examples, is no multiple of group_size; or they would be packed.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool,
        packing: bool,
        max_length: int,
        pad_to_multiple_of: int,
        devices: int = 1,
        order: Order | None = None,
        group_size: int = 1,
    ) -> None:
        _check_examples(examples, max_length)
        if group_size > 1 and (packing or batch_size % group_size or len(examples) % group_size):
            raise ValueError(
                f"batch_size and the number of examples must be multiples of group_size={group_size}, without packing, got "
                f"batch_size={batch_size}, {len(examples)} examples and packing={packing}"
            )
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.global_rows = batch_size * accumulation
        self._examples = examples
        self._visit = order or partial(epoch_order, seed=seed, shuffle=shuffle)
        self._multiple = pad_to_multiple_of
        self.group_size = group_size
        self._batch_axis = round_up(batch_size, devices)
        self._fixed_length = round_up(max_length, pad_to_multiple_of) if packing else None
        self._rows = (
            [[i] for i in range(len(examples))]
            if self._fixed_length is None
            else _packed_rows(examples, self._fixed_length, self._visit(len(examples), epoch=0))
        )
        self.steps_per_epoch = -(-len(self._rows) // self.global_rows)
        self.batches_per_epoch = -(-len(self._rows) // batch_size)
        self._cached_epoch = -1
        self._cached_order = np.empty(0, np.int64)

    def batch(self, step: int) -> StepBatch:
        """The step batch of a step, counted from 0 over all epochs."""
        rows = [[self._examples[i] for i in self._rows[row]] for row in self.rows_of(step)]
        length = self._fixed_length or round_up(max(_tokens(row) for row in rows), self._multiple)
        shape = (self.accumulation, self._batch_axis)
        arrays = empty_batch(shape, length)
        for index, row in enumerate(rows):
            micro, place = divmod(index, self.batch_size)
            _fill(arrays, (micro, place), row, index)
        valid = int(np.count_nonzero(arrays.targets != IGNORE))
        return StepBatch(arrays.input_ids, arrays.targets, arrays.segments, arrays.positions, arrays.rows, valid)

    def rows_of(self, step: int) -> np.ndarray:
        """int64 ``[rows]``: which rows (examples, where nothing is packed) a step takes, in its order, along which its
        batch's `rows` count."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self.global_rows : (position + 1) * self.global_rows]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._cached_epoch:
            visited = self._visit(len(self._rows) // self.group_size, epoch=epoch)
            self._cached_order = (visited[:, None] * self.group_size + np.arange(self.group_size)).ravel()
            self._cached_epoch = epoch
        return self._cached_order


def eval_batches(
    examples: Sequence[Example], batch_size: int, pad_to_multiple_of: int, max_length: int, devices: int = 1
) -> list[Batch]:
    """Examples in their order, batch_size a batch, each batch padded like a step batch; the last is filled up with filler rows.

    Raises:
        DataError: no examples, or one is longer than max_length.
    """
    _check_examples(examples, max_length)
    batches = []
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        length = round_up(max(len(row.tokens) for row in rows), pad_to_multiple_of)
        batch = empty_batch((round_up(batch_size, devices),), length)
        for index, row in enumerate(rows):
            _fill(batch, (index,), [row], index)
        batches.append(batch)
    return batches


def _check_examples(examples: Sequence[Example], max_length: int) -> None:
    if not examples:
        raise DataError("there are no examples; at least one is needed")
    wrong = [number for number, e in enumerate(examples) if not 0 < len(e.tokens) <= max_length]
    if wrong:
        raise DataError(f"examples must have 1 to max_length={max_length} tokens; these have not: {first_few(wrong)}")


def _packed_rows(examples: Sequence[Example], capacity: int, order: np.ndarray) -> list[list[int]]:
    rows = pack([len(examples[i].tokens) for i in order], capacity)
    return [[int(order[place]) for place in row] for row in rows]


def _tokens(row: Sequence[Example]) -> int:
    return sum(len(example.tokens) for example in row)


def round_up(value: int, multiple: int) -> int:
    """The multiple at or above the value."""
    return -(-value // multiple) * multiple


def empty_batch(shape: tuple[int, ...], length: int) -> Batch:
    """Filler rows only; shape is all axes before the length."""
    return Batch(
        input_ids=np.zeros((*shape, length), np.int32),
        targets=np.full((*shape, length), IGNORE, np.int32),
        segments=np.full((*shape, length), PADDING_SEGMENT, np.int32),
        positions=np.zeros((*shape, length), np.int32),
        rows=np.full(shape, FILLER_ROW, np.int32),
    )


def _fill(arrays: Batch, place: tuple[int, ...], row: Sequence[Example], index: int) -> None:
    """Writes a row's documents side by side into the arrays at `place`."""
    arrays.rows[place] = index
    start = 0
    for segment, example in enumerate(row, start=1):
        end = start + len(example.tokens)
        arrays.input_ids[place][start:end] = example.tokens
        # The last token of a document predicts nothing: what follows belongs to another.
        arrays.targets[place][start : end - 1] = np.where(example.learn[1:], example.tokens[1:], IGNORE)
        arrays.segments[place][start:end] = segment
        arrays.positions[place][start:end] = np.arange(end - start)
        start = end
