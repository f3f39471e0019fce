"""Decoding with a KV cache: prefill of left-padded prompts, then one token a row at a time; one program each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.jax_backend.layers import Context
from jaxsloth.jax_backend.train_step import rates_of

if TYPE_CHECKING:
    from jaxsloth.jax_backend.model import JaxModel

BUCKET = 64  # prompts and caches are rounded up to this many slots, so that few shapes compile


@partial(jax.jit, static_argnames=("structure", "ropes"), donate_argnums=(2,))
def _forward(trained: Any, frozen: Any, caches: Any, inputs: Any, frequencies: Any, structure: Any, ropes: Any) -> Any:
    """(logits after the last position float32 ``[batch, vocab]``, the caches with this pass written)."""
    decoder = nnx.merge(structure, trained, frozen)
    tables = decoder.rope_tables(inputs["positions"], rates_of(ropes, frequencies))
    context = Context(tables, inputs["segments"], inputs["kv_segments"], inputs["used"])
    hidden, caches = decoder.hidden(inputs["input_ids"], context, caches)
    return decoder.logits(hidden[:, -1]), caches


class DecodeState:
    """A batch being decoded. Slots are shared by all rows; a row's padding occupies its first ones and is never seen."""

    def __init__(self, model: JaxModel, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
        batch, length = input_ids.shape
        if length > capacity:
            raise ValueError(f"the prompts take {length} slots and the cache has {capacity}")
        extra = -length % BUCKET
        slots = np.arange(length + extra)
        padding = (length + extra - lengths)[:, None]
        self._model, self._used = model, 0
        self._left = capacity - length
        total = length + extra + self._left
        self._segments = np.zeros((batch, total + -total % BUCKET), np.int32)
        self._segments[:, : length + extra] = slots >= padding
        self._next = lengths.astype(np.int32)  # each row's next position
        self._caches = model.decoder().empty_caches(batch, self._segments.shape[1])
        positions = np.maximum(slots - padding, 0).astype(np.int32)
        ids = np.pad(input_ids, ((0, 0), (extra, 0)))
        self.first_logits = self._run(ids, positions, self._segments[:, : length + extra])

    def step(self, tokens: np.ndarray) -> np.ndarray:
        if self._left == 0:
            raise ValueError("the cache's slots are all used")
        self._left -= 1
        self._segments[:, self._used] = 1
        positions = self._next[:, None].copy()
        self._next += 1
        return self._run(tokens[:, None], positions, np.ones_like(positions))

    def greedy(self, tokens: np.ndarray, count: int) -> Iterator[np.ndarray]:
        """See `jaxsloth.backend.DecodeState`."""
        for _ in range(count):
            tokens = self.step(tokens).argmax(axis=1).astype(np.int32)
            yield tokens[:, None]

    def _run(self, input_ids: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
        model = self._model
        frequencies, ropes = model.frequencies(int(positions.max(initial=0)) + 1)
        inputs = {
            "input_ids": jnp.asarray(input_ids, jnp.int32),
            "positions": jnp.asarray(positions),
            "segments": jnp.asarray(segments),
            "kv_segments": jnp.array(self._segments),
            "used": jnp.int32(self._used),
        }
        model.count_compilation("decode", (*input_ids.shape, self._segments.shape[1]))
        logits, self._caches = _forward(
            model.trained, model.frozen, self._caches, inputs, frequencies, structure=model.structure, ropes=ropes
        )
        self._used += input_ids.shape[1]
        return np.asarray(logits)
