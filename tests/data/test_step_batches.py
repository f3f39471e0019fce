"""Windows: what a step holds, for every layout, device count and packing."""

from collections import Counter

import numpy as np
import pytest

from jaxsloth.batch import IGNORE
from jaxsloth.data.encode import Example
from jaxsloth.data.errors import DataError
from jaxsloth.data.packing import pack
from jaxsloth.data.step_batches import StepBatches, eval_batches

LAYOUTS = [(8, 1), (2, 4), (1, 8), (4, 2)]


def documents(count=43, longest=30, seed=0):
    """Documents of 1 to `longest` tokens; every token of every document is different, so nothing can hide."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    ends = np.cumsum(lengths)
    return [
        Example(np.arange(1 + end - length, 1 + end, dtype=np.int32), generator.random(length) < 0.7)
        for length, end in zip(lengths, ends, strict=True)
    ]


def stream(examples, **settings):
    defaults = {"batch_size": 4, "accumulation": 2, "seed": 3, "shuffle": True, "packing": False}
    return StepBatches(examples, **{**defaults, "max_length": 30, "pad_to_multiple_of": 8, **settings})


def read_rows(step_batch):
    """Each real row of a step batch, by its index: the documents in it as (tokens, targets), read through the segments."""
    rows = {}
    for place in np.ndindex(step_batch.rows.shape):
        segments = step_batch.segments[place]
        index = int(step_batch.rows[place])
        if index < 0:
            assert not segments.any()
            continue
        assert index not in rows, "a row comes twice"
        rows[index] = []
        for segment in range(1, segments.max() + 1):
            (where,) = np.nonzero(segments == segment)
            assert (np.diff(where) == 1).all(), "a document is torn"
            assert step_batch.positions[place][where].tolist() == list(range(len(where)))
            rows[index].append((tuple(step_batch.input_ids[place][where]), tuple(step_batch.targets[place][where])))
        assert (step_batch.input_ids[place][segments == 0] == 0).all()
        assert (step_batch.targets[place][segments == 0] == IGNORE).all()
    assert sorted(rows) == list(range(len(rows)))
    return [rows[index] for index in range(len(rows))]


def expected_document(example):
    targets = [int(token) if learn else IGNORE for token, learn in zip(example.tokens[1:], example.learn[1:], strict=True)]
    return tuple(example.tokens), (*targets, IGNORE)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_holds_every_document_once(packing, shuffle):
    examples = documents()
    step_batches = stream(examples, packing=packing, shuffle=shuffle)
    expected = Counter(expected_document(example) for example in examples)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * step_batches.steps_per_epoch, (epoch + 1) * step_batches.steps_per_epoch)
        rows = [row for step in steps for row in read_rows(step_batches.batch(step))]
        assert Counter(document for row in rows for document in row) == expected
        epochs.append(rows)
    assert (epochs[0] == epochs[1]) is not shuffle
    if not shuffle and not packing:
        assert [document for row in epochs[0] for document in row] == [expected_document(e) for e in examples]


@pytest.mark.parametrize("packing", [False, True])
def test_layout_and_devices_change_nothing(packing):
    examples = documents()
    expected = None
    for batch_size, accumulation in LAYOUTS:
        for devices in (1, 2, 3):
            step_batches = stream(examples, batch_size=batch_size, accumulation=accumulation, packing=packing, devices=devices)
            steps = [step_batches.batch(step) for step in range(step_batches.steps_per_epoch)]
            assert all(w.input_ids.shape[0] == accumulation and w.input_ids.shape[1] % devices == 0 for w in steps)
            assert all((np.count_nonzero(w.rows >= 0, axis=1) <= batch_size).all() for w in steps)
            found = [(read_rows(step_batch), step_batch.valid_tokens, step_batch.tokens) for step_batch in steps]
            expected = expected or found
            assert found == expected


def test_steps_are_random_access():
    examples = documents()
    straight, jumping = stream(examples), stream(examples)
    there = {step: read_rows(jumping.batch(step)) for step in (17, 0, 9, 5, 16)}
    assert there == {step: read_rows(straight.batch(step)) for step in range(18) if step in there}


def test_lengths_and_counts():
    examples = documents()
    step_batches = stream(examples)
    assert step_batches.global_rows == 8
    assert step_batches.steps_per_epoch == 6
    for step in range(step_batches.steps_per_epoch):
        step_batch = step_batches.batch(step)
        rows = read_rows(step_batch)
        longest = max(len(tokens) for [(tokens, _)] in rows)
        assert step_batch.input_ids.shape[2] == -(-longest // 8) * 8
        assert step_batch.valid_tokens == sum(target != IGNORE for [(_, targets)] in rows for target in targets)
        assert step_batch.tokens == sum(len(tokens) for [(tokens, _)] in rows)
    assert len(rows) == 43 - 5 * 8, "the last step is short"
    for array in (step_batch.input_ids, step_batch.targets, step_batch.segments, step_batch.positions, step_batch.rows):
        assert array.dtype == np.int32


def test_packed_rows_are_full():
    examples = documents(count=400)
    step_batches = stream(examples, packing=True, max_length=60)
    shapes = {step_batches.batch(step).input_ids.shape for step in range(step_batches.steps_per_epoch)}
    assert shapes == {(2, 4, 64)}
    tokens = sum(len(example.tokens) for example in examples)
    rows = sum(len(read_rows(step_batches.batch(step))) for step in range(step_batches.steps_per_epoch))
    assert tokens / (rows * 64) > 0.95


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_pack(buffer):
    lengths = np.random.default_rng(1).integers(1, 33, 200).tolist()
    rows = pack(lengths, 32, buffer)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert all(sum(lengths[index] for index in row) <= 32 for row in rows)
    assert all(max(row) - min(row) < buffer for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert rows == pack(lengths, 32, buffer)
    # Best fit decreasing needs at most 11/9 of the best plus 4 (Johnson 1974); the best is at least the tokens / capacity.
    if buffer == 1000:
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // 32) + 4


def test_pack_fills_a_row_exactly():
    assert pack([5, 3, 4, 4, 2, 6], 8) == [[0, 1], [2, 3], [4, 5]]


def test_eval_batches():
    examples = documents(count=10)
    batches = eval_batches(examples, 4, 8, 30, devices=3)
    found = [document for batch in batches for row in read_rows(batch) for document in row]
    assert found == [expected_document(example) for example in examples]
    assert [batch.input_ids.shape[0] for batch in batches] == [6, 6, 6]
    assert all(batch.input_ids.shape[1] % 8 == 0 for batch in batches)


def test_wrong_examples():
    with pytest.raises(DataError, match="there are no examples"):
        stream([])
    with pytest.raises(DataError, match="1 to max_length=12 tokens; these have not: 1"):
        stream([Example(np.ones(n, np.int32), np.ones(n, bool)) for n in (12, 13)], max_length=12)


@pytest.mark.parametrize("batch_size, accumulation", [(8, 1), (4, 2), (2, 4)])
def test_pairs_are_visited_together(batch_size, accumulation):
    """Examples 2i and 2i + 1 stand in consecutive rows of one micro-batch, in the order in which pairs are visited."""
    examples = documents(22)

    def backwards(count, *, epoch):
        assert count == 11
        return np.arange(count)[::-1] if epoch == 0 else np.arange(count)

    made = stream(examples, batch_size=batch_size, accumulation=accumulation, order=backwards, group_size=2)
    assert (made.steps_per_epoch, made.group_size) == (3, 2)
    found = [document for step in range(3) for (document,) in read_rows(made.batch(step))]
    expected = [row for pair in range(10, -1, -1) for row in (2 * pair, 2 * pair + 1)]
    assert found == [expected_document(examples[row]) for row in expected]
    assert np.concatenate([made.rows_of(step) for step in range(3)]).tolist() == expected
    assert made.rows_of(3).tolist() == list(range(8))
    last = made.batch(2).rows
    assert np.all((last[:, 0::2] < 0) == (last[:, 1::2] < 0))


@pytest.mark.parametrize("wrong", [{"packing": True}, {"batch_size": 3}, {"group_size": 3}])
def test_pairs_that_cant_stay_together(wrong):
    with pytest.raises(ValueError, match="must be multiples of group_size="):
        stream(documents(22), **{"group_size": 2, **wrong})
