"""Decoding with a KV cache: prefill of left-padded prompts a bounded number of tokens at a time, then one token a row."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import torch

from jaxsloth.decoded_rows import DecodedRows
from jaxsloth.kernels.registry import choose_written
from jaxsloth.models.buildable import decode_refusal
from jaxsloth.models.spec import Attention
from jaxsloth.sampling import Sampling, Variant
from jaxsloth.torch_backend import autograd_pass
from jaxsloth.torch_backend.decode_pass import KEPT_BYTES, KEPT_SHARE, SLOTS, DecodeProgram
from jaxsloth.torch_backend.devices import to_device
from jaxsloth.torch_backend.run import Cache, Run
from jaxsloth.torch_backend.sampling import Sampler
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
    device, most = model.decoder.device, float(KEPT_BYTES)
    if device.type == "cuda":
        most = max(most, KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory)
    if program.cache_bytes <= most:
        model.idle_program = program


class DecodeState(DecodedRows):
    """A batch being decoded."""

    def __init__(self, model: ModelState, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
        super().__init__(input_ids, lengths, capacity, model.spec.embedding.vocab)
        batch, length = input_ids.shape
        self._model, layers = model, model.decoder.spec.layers
        self._program = take_program(model, batch, capacity)
        if self._program is None:
            self._caches = tuple(Cache(self._empty(layer.attention), self._empty(layer.attention)) for layer in layers)
        else:
            self._caches = tuple(Cache(keys, values) for keys, values in self._program.caches)
            weakref.finalize(self, give_back, model, self._program).atexit = False
        size, arrays = max(PREFILL // batch, 1), self._prompt()
        for start in range(0, length, size):
            hidden = self._forward(*(array[:, start : start + size] for array in arrays))
        self._logits = self._head(hidden)

    def logits(self) -> np.ndarray:
        return self._logits.cpu().numpy()

    def _after(self, tokens: np.ndarray) -> None:
        self._segments[:, self._used] = 1
        for cache in self._caches:
            cache.used = self._used
        positions = self._next[:, None]
        self._logits = self._head(self._forward(np.maximum(tokens, 0)[:, None], positions, np.ones_like(positions)))

    def _bursts(self, sampling: Sampling, variant: Variant, count: int) -> Iterator[np.ndarray]:
        ids, program = self._ids[:, : self._used], self._program
        if program is not None:
            yield program.begin(sampling, variant, self._logits, ids, self._next)[:, None]
            yield from program.decode_chunks(variant, ids.shape[1], count - 1)
            return
        device, (batch, slots) = self._model.decoder.device, self._ids.shape
        sampler = Sampler(variant, batch, slots, self._vocab, device)
        sampler.begin(sampling, ids, self._next)
        slot, positions = torch.tensor([self._used], device=device), torch.from_numpy(self._next.copy()).to(device)
        for index in range(count):
            said, token = sampler.choose(self._logits, slot + index, positions + index)
            yield said.cpu().numpy()[:, None]
            if index + 1 < count:
                self._after(token.cpu().numpy())

    @torch.no_grad()
    def reorder(self, rows: np.ndarray) -> None:
        """See `jaxsloth.backend.DecodeState`. In place: a recorded program reads this memory."""
        places = to_device(rows.astype(np.int64), self._model.decoder.device)
        for cache in self._caches:
            for kept in (cache.keys, cache.values):
                kept[:, : self._used] = kept[places, : self._used]
        self._reorder(rows)

    @torch.no_grad()
    def _forward(self, input_ids: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> torch.Tensor:
        """The last hidden state of every row."""
        decoder = self._model.decoder
        device, length = decoder.device, max(int(self._next.max(initial=0)), int(positions.max(initial=0)) + 1)
        run = Run(
            tables=decoder.rope_tables(to_device(positions, device), length),
            segments=to_device(segments, device),
            kv_segments=to_device(self._segments, device),
            caches=self._caches,
        )
        return autograd_pass.hidden(decoder, to_device(input_ids.astype(np.int32), device), run)[:, -1]

    @torch.no_grad()
    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.decoder.lm_head(hidden)

    def _empty(self, attention: Attention) -> torch.Tensor:
        decoder, shape = self._model.decoder, (*self._ids.shape, attention.kv_heads, attention.head_dim)
        return torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
