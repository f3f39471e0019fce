"""What both backends' states of a batch being decoded have in common: which slots hold what, and how choices go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxsloth.sampling import NOTHING, TOO_FEW, Sampling, Variant


class DecodedRows(ABC):
    """The slots of a batch, shared by all rows: a row's padding occupies its first ones and is never seen.

    ids int32 and segments int32 ``[batch, slots]``, 1 where a token counts; used: how many slots are written; next int32
    ``[batch]``, each row's next position; limit: how many slots may be written. bucket: what prompts and slots are rounded up
    to.
    """

    def __init__(
        self, input_ids: np.ndarray, lengths: np.ndarray, capacity: int, vocab: int, bucket: tuple[int, int] = (1, 1)
    ) -> None:
        batch, length = input_ids.shape
        if length > capacity:
            raise ValueError(f"the prompts take {length} slots and the cache has {capacity}")
        extra = -length % bucket[0]
        self._vocab, self._used, self._limit = vocab, length + extra, capacity + extra
        self._next = lengths.astype(np.int32)
        shape = (batch, self._limit + -self._limit % bucket[1])
        self._ids, self._segments = np.full(shape, NOTHING, np.int32), np.zeros(shape, np.int32)
        self._ids[:, extra : self._used] = input_ids
        self._segments[:, : self._used] = np.arange(self._used) >= (self._used - lengths)[:, None]

    def _prompt(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(input_ids, positions, segments) of what prefill reads, int32 ``[batch, used]``."""
        seen = self._segments[:, : self._used]
        positions = np.maximum(np.cumsum(seen, axis=1, dtype=np.int32) - 1, 0)
        return np.maximum(self._ids[:, : self._used], 0), positions, seen

    @abstractmethod
    def logits(self) -> np.ndarray:
        """See `jaxsloth.backend.DecodeState`."""

    @abstractmethod
    def _after(self, tokens: np.ndarray) -> None:
        """Runs one token a row (int ``[batch]``) in the next slot and keeps the logits that follow, but notes nothing."""

    @abstractmethod
    def _bursts(self, sampling: Sampling, variant: Variant, count: int) -> Iterator[np.ndarray]:
        """At most `count` tokens a row, int ``[batch, n]`` at a time: the first follows the logits that are kept. When it is
        asked for more, all that it has given but the last of them is noted."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `jaxsloth.backend.DecodeState`."""
        self._check(1)
        self._after(tokens)
        self._note(tokens[:, None])
        return self.logits()

    def choose(self, sampling: Sampling, count: int) -> Iterator[np.ndarray]:
        """See `jaxsloth.backend.DecodeState`."""
        self._check(count - 1)
        sampling.check(self._vocab, len(self._next))
        return self._chosen(sampling, count)

    def _chosen(self, sampling: Sampling, count: int) -> Iterator[np.ndarray]:
        variant = sampling.variant(self._vocab)
        last: Any = None  # said, and not yet appended
        while count > 0:
            few = np.zeros(1, bool)
            for burst in self._bursts(sampling, variant, count):
                few = (burst == TOO_FEW).any(axis=0)
                said = burst[:, : int(few.argmax())] if few.any() else burst
                if said.shape[1]:
                    tokens = said if last is None else np.concatenate([last, said], axis=1)
                    self._note(tokens[:, :-1])
                    last, count = tokens[:, -1:], count - said.shape[1]
                    yield said.astype(np.int32)
                if few.any():
                    break
            if few.any():  # from here on among all
                variant = sampling.variant(self._vocab, everything=True)
                if last is not None:
                    self._after(last[:, 0])
                    self._note(last)
                    last = None

    def _note(self, tokens: np.ndarray) -> None:
        """Tokens int ``[batch, n]`` are in the next slots."""
        place = slice(self._used, self._used + tokens.shape[1])
        self._ids[:, place], self._segments[:, place] = np.maximum(tokens, 0), 1
        self._used += tokens.shape[1]
        self._next = self._next + np.int32(tokens.shape[1])

    def _reorder(self, rows: np.ndarray) -> None:
        self._ids, self._segments, self._next = self._ids[rows], self._segments[rows], self._next[rows]

    def _check(self, count: int) -> None:
        if self._used + count > self._limit:
            left = self._limit - self._used
            raise ValueError(f"{count} more tokens do not fit: the cache has {left} slots left")
