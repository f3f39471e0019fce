"""Decoding with a KV cache: prefill of left-padded prompts a bounded number of tokens at a time, then one token a row."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import torch

from jaxsloth.kernels.registry import choose_written
from jaxsloth.models.buildable import decode_refusal
from jaxsloth.models.spec import Attention
from jaxsloth.torch_backend import autograd_pass
from jaxsloth.torch_backend.decode_pass import KEPT_BYTES, SLOTS, DecodeProgram
from jaxsloth.torch_backend.placement import to_device
from jaxsloth.torch_backend.run import Cache, Run
from jaxsloth.torch_backend.state import ModelState

PREFILL = 8192  # tokens of all rows that one pass over the prompts takes


def take_program(model: ModelState, batch: int, capacity: int) -> DecodeProgram | None:
    """A program for so many rows and slots, the one of an earlier request where it fits; None where the layers are to be run
    as they are. implementations={"decode_step": "fused" or "composed"} asks for one by name.

    Raises:
        RefusedError: "fused" was asked for and can't run this model, or another name came.
    """
    requested = (model.options.implementations or {}).get("decode_step")
    if not choose_written("decode_step", "torch", requested, decode_refusal(model.spec), model.decoder.device.type):
        return None
    program, model.idle_program = model.idle_program, None
    if program is None or not program.serves(model.decoder, batch, capacity):
        del program  # its caches go before new ones come
        matvec = (model.options.implementations or {}).get("nf4_matvec")
        program = DecodeProgram(model.decoder, batch, capacity + -capacity % SLOTS, matvec)
    return program


def give_back(model: ModelState, program: DecodeProgram) -> None:
    """Leaves a program to the next request, unless it holds much memory."""
    if program.cache_bytes <= KEPT_BYTES:
        model.idle_program = program


class DecodeState:
    """A batch being decoded. Slots are shared by all rows; a row's padding occupies its first ones and is never seen."""

    def __init__(self, model: ModelState, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
        batch, length = input_ids.shape
        if length > capacity:
            raise ValueError(f"the prompts take {length} slots and the cache has {capacity}")
        decoder = model.decoder
        self._model, self._capacity, self._used = model, capacity, length
        self._next = lengths.astype(np.int32)  # each row's next position
        slots = np.arange(length)
        padding = (length - lengths)[:, None]
        self._segments = np.zeros((batch, capacity), np.int32)
        self._segments[:, :length] = slots >= padding
        positions = np.maximum(slots - padding, 0).astype(np.int32)
        self._program = take_program(model, batch, capacity)
        if self._program is None:
            self._caches = tuple(
                Cache(self._empty(batch, layer.attention), self._empty(batch, layer.attention)) for layer in decoder.spec.layers
            )
        else:
            self._caches = tuple(Cache(keys, values) for keys, values in self._program.caches)
            weakref.finalize(self, give_back, model, self._program).atexit = False
        size = max(PREFILL // batch, 1)
        for start in range(0, length, size):
            part = slice(start, start + size)
            hidden = self._forward(input_ids[:, part], positions[:, part], self._segments[:, :length][:, part])
        self.first_logits = self._logits(hidden)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self._check(1)
        self._segments[:, self._used] = 1
        self._used += 1
        positions = self._next[:, None].copy()
        self._next += 1
        return self._logits(self._forward(tokens[:, None], positions, np.ones_like(positions)))

    def greedy(self, tokens: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """See `jaxsloth.backend.DecodeState`."""
        self._check(count)
        if self._program is None:
            return self._greedy_by_steps(tokens, count)
        used = self._used
        self._program.begin(self._next, used)
        self._segments[:, used : used + count] = 1
        self._used += count
        self._next += count
        for cache in self._caches:
            cache.used = self._used
        return self._program.decode_chunks(tokens, used, count)

    @torch.no_grad()
    def reorder(self, rows: np.ndarray) -> None:
        """See `jaxsloth.backend.DecodeState`. In place: a recorded program reads this memory."""
        places = to_device(rows.astype(np.int64), self._model.decoder.device)
        for cache in self._caches:
            for kept in (cache.keys, cache.values):
                kept[:, : self._used] = kept[places, : self._used]
        self._segments, self._next = self._segments[rows], self._next[rows]

    def _greedy_by_steps(self, tokens: np.ndarray, count: int) -> Iterator[np.ndarray]:
        for _ in range(count):
            tokens = self.step(tokens).argmax(axis=1).astype(np.int32)
            yield tokens[:, None]

    def _check(self, count: int) -> None:
        if self._used + count > self._capacity:
            raise ValueError(f"{count} more tokens do not fit: {self._used} of the cache's {self._capacity} slots are used")

    @torch.no_grad()
    def _forward(self, input_ids: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> torch.Tensor:
        """The last hidden state of every row."""
        decoder = self._model.decoder
        device = decoder.device
        run = Run(
            tables=decoder.rope_tables(to_device(positions, device), int(self._next.max(initial=0))),
            segments=to_device(segments, device),
            kv_segments=to_device(self._segments, device),
            caches=self._caches,
        )
        return autograd_pass.hidden(decoder, to_device(input_ids.astype(np.int32), device), run)[:, -1]

    @torch.no_grad()
    def _logits(self, hidden: torch.Tensor) -> np.ndarray:
        return self._model.decoder.lm_head(hidden).cpu().numpy()

    def _empty(self, batch: int, attention: Attention) -> torch.Tensor:
        decoder, shape = self._model.decoder, (batch, self._capacity, attention.kv_heads, attention.head_dim)
        return torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
