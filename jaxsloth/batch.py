"""What the data pipeline hands to a backend: numpy arrays of fixed shape, the same for both backends."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import numpy as np

logger = logging.getLogger("jaxsloth.batch")

IGNORE = -100
PADDING_SEGMENT = 0


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, right-padded, perhaps packed.

    targets are already shifted: targets[b, t] is what position t must predict, `IGNORE` where nothing is asked (the prompt,
    padding, the last token of a document). segments count the documents of a row from 1; 0 is padding. positions restart at 0
    in each document. rows is each row's index in the global batch of its step, -1 for a row that only fills the shape.
    """

    input_ids: np.ndarray  # int32 [batch, length]
    targets: np.ndarray  # int32 [batch, length]
    segments: np.ndarray  # int32 [batch, length]
    positions: np.ndarray  # int32 [batch, length]
    rows: np.ndarray  # int32 [batch]

    def valid_tokens(self) -> int:
        """How many positions have a target."""
        return int(np.count_nonzero(self.targets != IGNORE))


@dataclass(frozen=True)
class Window:
    """All micro-batches of one optimizer step, over all devices, with the count that the loss is divided by.

    The arrays are a Batch's with a leading accumulation axis: ``[accumulation, batch, length]`` and ``[accumulation, batch]``.
    batch is the whole global micro-batch: a backend takes its devices' rows of it (axis 1, contiguous, equal shares).
    """

    input_ids: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    valid_tokens: int  # targets that are not IGNORE, in the whole window

    @property
    def tokens(self) -> int:
        """How many positions hold a token (not padding): what tokens/s counts."""
        return int(np.count_nonzero(self.segments != PADDING_SEGMENT))


def check_ids(ids: np.ndarray, vocab: int, what: str = "input_ids") -> np.ndarray:
    """Token ids as int32; ValueError names the first that the vocabulary has not, and a dtype that is not of whole numbers."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{what} must be whole numbers, got {ids.dtype}")
    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        place = tuple(int(index) for index in np.argwhere(outside)[0])
        raise ValueError(
            f"{what} must be token ids of the model, from 0 to {vocab - 1}, got {int(ids[place])} at {list(place)}; the "
            "tokenizer must be the model's own"
        )
    return ids.astype(np.int32)


def check_length(length: int, positions: int) -> None:
    """Warns, once a process, where rows may be longer than the positions that a model was made for."""
    if length > positions:
        _warn_of_length(positions)


@cache
def _warn_of_length(positions: int) -> None:
    logger.warning(
        "rows may have more than the %d positions that the model was made for (max_position_embeddings); rotary positions go "
        "on, but it has not learnt them: shorten the rows, or stretch the positions with rope_scaling",
        positions,
    )


def pairs_of(window: Window, devices: int) -> tuple[int, np.ndarray]:
    """(how many pairs of rows 2i and 2i + 1 have a target, every row's count of targets: float32 ``[accumulation, batch]``).

    Raises:
        ValueError: rows are packed, or a device's share of them is odd.
    """
    if window.segments.max(initial=0) > 1:
        raise ValueError("pairs of answers are trained a row an answer, and this window is packed; make it with packing off")
    rows = window.targets.shape[1]
    if rows % (2 * devices):
        raise ValueError(
            f"rows 2i and 2i + 1 are a pair, so a batch must have a multiple of {2 * devices} rows on {devices} device(s), "
            f"and it has {rows}"
        )
    counts = np.count_nonzero(window.targets != IGNORE, axis=2).astype(np.float32)
    return int(np.count_nonzero(counts.reshape(-1, 2).any(axis=1))), counts


def check_reference(window: Window, reference: np.ndarray) -> None:
    """ValueError where a reference is not one log-prob a row of the window."""
    if reference.shape != window.rows.shape:
        raise ValueError(
            f"reference must have a log-prob for every row of the window, {window.rows.shape}, and it has {reference.shape}"
        )
