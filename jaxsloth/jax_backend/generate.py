"""Decoding with a KV cache: prefill of left-padded prompts, then one token a row at a time; one program each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.decoded_rows import DecodedRows
from jaxsloth.jax_backend import decode_pass, devices, sampling
from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.sampling import begin, first
from jaxsloth.jax_backend.state import ModelState
from jaxsloth.sampling import Sampling, Variant

BUCKET = 64  # prompts and caches are rounded up to this many slots, so that few shapes compile
SLOTS = 256  # and caches to so many where attention reads those slots alone that are written
BURST = 8  # tokens a row that one program says


@partial(jax.jit, static_argnames=("structure", "ropes"), donate_argnums=(2,))
def _forward(trained: Any, frozen: Any, caches: Any, inputs: Any, frequencies: Any, structure: Any, ropes: Any) -> Any:
    """(logits after the last position float32 ``[batch, vocab]``, the caches with this pass written)."""
    decoder = nnx.merge(structure, trained, frozen)
    more = {name: inputs[name] for name in ("kv_segments", "used")}
    run = decoder.run(inputs["positions"], inputs["segments"], ropes, frequencies, **more)
    hidden, caches = decoder.hidden(inputs["input_ids"], run, caches)
    return decoder.head().forward(hidden[:, -1]), caches


@partial(jax.jit, static_argnames=("structure", "ropes", "variant", "count"), donate_argnums=(2,))
def _say(
    trained: Any,
    frozen: Any,
    caches: Any,
    inputs: Any,
    numbers: Any,
    frequencies: Any,
    structure: Any,
    ropes: Any,
    variant: Variant,
    count: int,
) -> tuple[Any, Any, Any]:
    """(`count` tokens that follow inputs["tokens"], int32 ``[batch, count]``, the inputs of what follows them, the caches).
    numbers and inputs["kept"]: of `sampling.begin`. Nothing of it waits for the host."""

    def step(carried: Any, _: Any) -> Any:
        caches, state = carried
        decoder = nnx.merge(structure, trained, frozen)
        seen = jax.lax.dynamic_update_slice_in_dim(
            state["kv_segments"], jnp.ones_like(state["kv_segments"][:, :1]), state["used"], axis=1
        )
        more = {"kv_segments": seen, "used": state["used"], "decoding": True}
        run = decoder.run(state["positions"], jnp.ones_like(state["positions"]), ropes, frequencies, **more)
        hidden, caches = decoder.hidden(state["tokens"][:, None], run, caches)
        positions, slot = state["positions"] + 1, state["used"] + 1
        logits = decoder.head().forward(hidden[:, -1])
        said, tokens, kept = sampling.choose(logits, numbers, state["kept"], slot, positions[:, 0], variant)
        after = {"tokens": tokens, "positions": positions, "kv_segments": seen, "used": slot, "kept": kept}
        return (caches, after), said

    (caches, state), said = jax.lax.scan(step, (caches, inputs), None, length=count)
    return said.T, state, caches


@partial(jax.jit, donate_argnums=(0,))
def _reordered(caches: Any, rows: Any) -> Any:
    return jax.tree.map(lambda stack: stack[:, rows], caches)


class DecodeState(DecodedRows):
    """A batch being decoded."""

    def __init__(self, model: ModelState, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
        slots = SLOTS if model.decodes_fused(fits_twice=True) and not model.stretches else BUCKET
        super().__init__(input_ids, lengths, capacity, model.spec.embedding.vocab, (BUCKET, slots))
        self._model = model
        # Stacked, or each layer's by itself once a fused burst has begun.
        self._caches: tuple[Cache, ...] | list[Cache] = devices.replicate(model.decoder().empty_caches(*self._ids.shape))
        self._logits = self._run(*self._prompt(), 0)

    def logits(self) -> np.ndarray:
        return np.asarray(self._logits)

    def _after(self, tokens: np.ndarray) -> None:
        self._segments[:, self._used] = 1
        positions = self._next[:, None]
        self._logits = self._run(np.maximum(tokens, 0)[:, None], positions, np.ones_like(positions), self._used)

    def _bursts(self, sampling: Sampling, variant: Variant, count: int) -> Iterator[np.ndarray]:
        model = self._model
        fused = model.decodes_fused(self._splits())
        numbers, kept = begin(sampling, variant, self._vocab, self._ids, self._used, self._next)
        slot, positions = np.int32(self._used), self._next
        said, tokens, kept = self._first(numbers, kept, slot, positions, variant)
        if not model.stretches:
            inputs = {"tokens": tokens, "positions": jnp.asarray(positions[:, None]), "kept": kept}
            if fused:
                inputs |= {"first": jnp.asarray(slot - positions), "slot": jnp.int32(slot)}
            else:
                inputs |= {"kv_segments": jnp.array(self._segments), "used": jnp.int32(slot)}
            yield np.asarray(said)[:, None]
            yield from self._say(inputs, numbers, variant, count - 1)
            return
        for index in range(count):
            yield np.asarray(said)[:, None]
            if index + 1 < count:
                self._after(np.asarray(tokens))
                slot, positions = slot + np.int32(1), positions + np.int32(1)
                said, tokens, kept = self._first(numbers, kept, slot, positions, variant)

    def _first(self, numbers: Any, kept: Any, slot: np.int32, positions: np.ndarray, variant: Variant) -> Any:
        with self._model.compiles():
            return first(self._logits, numbers, kept, slot, positions, variant=variant)

    def _splits(self) -> bool:
        """Whether the caches are each layer's by itself, or there is room to make them so: both lie there for a moment."""
        caches = self._caches
        return isinstance(caches, list) or sum(a.nbytes for a in jax.tree.leaves(caches)) <= devices.free_memory()

    def _say(self, inputs: Any, numbers: Any, variant: Variant, count: int) -> Iterator[np.ndarray]:
        """A burst is launched before the one before it is read. The last may go on past `count`: what it writes there is no
        row's, since slots count only where the host says so."""
        model, waiting = self._model, None
        frequencies, ropes = model.frequencies(1)
        fused = "slot" in inputs
        if count > 0 and fused and isinstance(self._caches, tuple):
            self._caches = decode_pass.split(self._caches)
        while count > 0 or waiting is not None:
            launched = None
            if count > 0:
                program = decode_pass.say if fused else _say
                own = (model.trained, model.frozen, self._caches, inputs, numbers, frequencies)
                with model.compiles():
                    said, inputs, self._caches = program(*own, model.structure, ropes, variant, BURST)
                launched, count = said[:, :count], count - BURST
            if waiting is not None:
                yield np.asarray(waiting)
            waiting = launched

    def reorder(self, rows: np.ndarray) -> None:
        """See `jaxsloth.backend.DecodeState`."""
        self._caches = _reordered(self._stacked(), jnp.asarray(rows, jnp.int32))
        self._reorder(rows)

    def _stacked(self) -> tuple[Cache, ...]:
        caches = self._caches
        return caches if isinstance(caches, tuple) else decode_pass.stacked(caches, self._model.spec.layer_period())

    def _run(self, input_ids: np.ndarray, positions: np.ndarray, segments: np.ndarray, used: int) -> Any:
        """The logits that follow, float32 ``[batch, vocab]``, on the device; `used`: the first slot that is written."""
        model = self._model
        frequencies, ropes = model.frequencies(int(positions.max(initial=0)) + 1)
        inputs = {
            "input_ids": jnp.asarray(input_ids, jnp.int32),
            "positions": jnp.asarray(positions),
            "segments": jnp.asarray(segments),
            "kv_segments": jnp.array(self._segments),
            "used": jnp.int32(used),
        }
        self._caches = self._stacked()  # the others go before the pass makes new ones
        with model.compiles():
            logits, self._caches = _forward(
                model.trained, model.frozen, self._caches, inputs, frequencies, structure=model.structure, ropes=ropes
            )
        return logits
