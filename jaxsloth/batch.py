"""What the data pipeline hands to a backend: numpy arrays of fixed shape, the same for both backends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
