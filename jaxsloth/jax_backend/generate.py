"""Decoding with a KV cache: prefill of left-padded prompts, then one token a row at a time; one program each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.jax_backend import decode_pass, placement
from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.state import ModelState

BUCKET = 64  # prompts and caches are rounded up to this many slots, so that few shapes compile
BURST = 8  # tokens a row that one program says


@partial(jax.jit, static_argnames=("structure", "ropes"), donate_argnums=(2,))
def _forward(trained: Any, frozen: Any, caches: Any, inputs: Any, frequencies: Any, structure: Any, ropes: Any) -> Any:
    """(logits after the last position float32 ``[batch, vocab]``, the caches with this pass written)."""
    decoder = nnx.merge(structure, trained, frozen)
    more = {name: inputs[name] for name in ("kv_segments", "used")}
    run = decoder.run(inputs["positions"], inputs["segments"], ropes, frequencies, **more)
    hidden, caches = decoder.hidden(inputs["input_ids"], run, caches)
    return decoder.head().forward(hidden[:, -1]), caches


@partial(jax.jit, static_argnames=("structure", "ropes", "count"), donate_argnums=(2,))
def _say(
    trained: Any, frozen: Any, caches: Any, inputs: Any, frequencies: Any, structure: Any, ropes: Any, count: int
) -> tuple[Any, Any, Any]:
    """(the `count` likeliest tokens that follow inputs["tokens"], int32 ``[batch, count]``, the inputs of what follows them,
    the caches). Nothing of it waits for the host."""

    def step(carried: Any, _: Any) -> Any:
        caches, state = carried
        decoder = nnx.merge(structure, trained, frozen)
        seen = jax.lax.dynamic_update_slice_in_dim(
            state["kv_segments"], jnp.ones_like(state["kv_segments"][:, :1]), state["used"], axis=1
        )
        more = {"kv_segments": seen, "used": state["used"], "decoding": True}
        run = decoder.run(state["positions"], jnp.ones_like(state["positions"]), ropes, frequencies, **more)
        hidden, caches = decoder.hidden(state["tokens"][:, None], run, caches)
        said = jnp.argmax(decoder.head().forward(hidden[:, -1]), axis=-1).astype(jnp.int32)
        after = {"tokens": said, "positions": state["positions"] + 1, "kv_segments": seen, "used": state["used"] + 1}
        return (caches, after), said

    (caches, state), said = jax.lax.scan(step, (caches, inputs), None, length=count)
    return said.T, state, caches


@partial(jax.jit, donate_argnums=(0,))
def _reordered(caches: Any, rows: Any) -> Any:
    return jax.tree.map(lambda stack: stack[:, rows], caches)


class DecodeState:
    """A batch being decoded. Slots are shared by all rows; a row's padding occupies its first ones and is never seen."""

    def __init__(self, model: ModelState, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
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
        # Stacked, or each layer's by itself once a fused burst has begun.
        self._caches: tuple[Cache, ...] | list[Cache] = placement.replicate(
            model.decoder().empty_caches(batch, self._segments.shape[1])
        )
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
        if count > self._left:
            raise ValueError(f"{count} more tokens do not fit: the cache has {self._left} slots left")
        fused = self._model.decodes_fused(self._splits())
        if self._model.stretches:
            return self._greedy_by_steps(tokens, count)
        inputs = {"tokens": jnp.asarray(tokens, jnp.int32), "positions": jnp.asarray(self._next[:, None])}
        if fused:
            inputs |= {"first": jnp.asarray(self._used - self._next, jnp.int32), "slot": jnp.int32(self._used)}
        else:
            inputs |= {"kv_segments": jnp.array(self._segments), "used": jnp.int32(self._used)}
        self._segments[:, self._used : self._used + count] = 1
        self._used += count
        self._left -= count
        self._next = self._next + np.int32(count)
        return self._say(inputs, count)

    def _splits(self) -> bool:
        """Whether the caches are each layer's by itself, or there is room to make them so: both lie there for a moment."""
        caches = self._caches
        return isinstance(caches, list) or sum(a.nbytes for a in jax.tree.leaves(caches)) <= placement.free_memory()

    def _say(self, inputs: Any, count: int) -> Iterator[np.ndarray]:
        """A burst is launched before the one before it is read. The last may go on past `count`: what it writes there is no
        row's, since slots count only where the host says so."""
        model, waiting = self._model, None
        frequencies, ropes = model.frequencies(1)
        fused = "slot" in inputs
        if fused and isinstance(self._caches, tuple):
            self._caches = decode_pass.split(self._caches)
        while count > 0 or waiting is not None:
            launched = None
            if count > 0:
                program = decode_pass.say if fused else _say
                with model.compiles():
                    said, inputs, self._caches = program(
                        model.trained, model.frozen, self._caches, inputs, frequencies, model.structure, ropes, BURST
                    )
                launched, count = said[:, :count], count - BURST
            if waiting is not None:
                yield np.asarray(waiting)
            waiting = launched

    def reorder(self, rows: np.ndarray) -> None:
        """See `jaxsloth.backend.DecodeState`."""
        self._caches = _reordered(self._stacked(), jnp.asarray(rows, jnp.int32))
        self._segments, self._next = self._segments[rows], self._next[rows]

    def _stacked(self) -> tuple[Cache, ...]:
        caches = self._caches
        return caches if isinstance(caches, tuple) else decode_pass.stacked(caches, self._model.spec.layer_period())

    def _greedy_by_steps(self, tokens: np.ndarray, count: int) -> Iterator[np.ndarray]:
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
        self._caches = self._stacked()  # the others go before the pass makes new ones
        with model.compiles():
            logits, self._caches = _forward(
                model.trained, model.frozen, self._caches, inputs, frequencies, structure=model.structure, ropes=ropes
            )
        self._used += input_ids.shape[1]
        return np.asarray(logits)
