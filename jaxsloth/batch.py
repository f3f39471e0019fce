"""What the data pipeline hands to a backend: numpy arrays of fixed shape, the same for both backends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
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

    def take(self, rows: slice) -> Batch:
        """Some of the rows."""
        return Batch(*(getattr(self, name)[rows] for name in FIELDS))


FIELDS = ("input_ids", "targets", "segments", "positions", "rows")


@dataclass(frozen=True)
class StepBatch:
    """All micro-batches of one optimizer step, over all devices, with the count that the loss is divided by.

    The arrays are a Batch's with a leading accumulation axis: ``[accumulation, batch, length]`` and ``[accumulation, batch]``.
    batch is the whole global micro-batch: a backend takes its devices' rows of it (axis 1, contiguous, equal shares). values:
    float32 ``[accumulation, batch]``, what the objective asks for beside targets (`objectives`).
    """

    input_ids: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    valid_tokens: int  # targets that are not IGNORE, in the whole step_batch
    values: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many positions hold a token (not padding): what tokens/s counts."""
        return int(np.count_nonzero(self.segments != PADDING_SEGMENT))

    def micro(self, index: int) -> Batch:
        """One micro-batch."""
        return Batch(*(getattr(self, name)[index] for name in FIELDS))


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
