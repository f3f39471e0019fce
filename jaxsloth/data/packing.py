"""Documents packed into rows: which documents share a row."""

from __future__ import annotations

from collections.abc import Sequence

# Documents looked at together: enough that rows fill up, few enough that a row's documents are near each other in the order.
BUFFER = 2048


def pack(lengths: Sequence[int], capacity: int, buffer: int = BUFFER) -> list[list[int]]:
    """Puts documents into rows of `capacity` tokens, none split: best fit decreasing (Johnson 1974) within each buffer.

    Args:
        lengths: tokens of each document, each at most capacity.
        capacity: tokens of a row.
        buffer: how many documents, in order, are packed together.

    Returns:
        the documents' indices of each row, ascending; rows in the order of their first document. Same input, same rows.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), buffer):
        rows += _best_fit_decreasing(lengths, range(start, min(start + buffer, len(lengths))), capacity)
    return sorted(sorted(row) for row in rows)


def _best_fit_decreasing(lengths: Sequence[int], documents: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for document in sorted(documents, key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        room = next((room for room in range(length, capacity + 1) if rows_by_room[room]), None)
        if room is None:
            row, room = len(rows), capacity
            rows.append([])
        else:
            row = rows_by_room[room].pop()
        rows[row].append(document)
        rows_by_room[room - length].append(row)
    return rows
