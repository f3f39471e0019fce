"""Decoding with a KV cache: prefill of left-padded prompts, then one token a row at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from jaxsloth.models.spec import Attention
from jaxsloth.torch_backend.layers import Cache, Context
from jaxsloth.torch_backend.train_step import to_device

if TYPE_CHECKING:
    from jaxsloth.torch_backend.model import TorchModel


class DecodeState:
    """A batch being decoded. Slots are shared by all rows; a row's padding occupies its first ones and is never seen."""

    def __init__(self, model: TorchModel, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
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
        self._caches = tuple(
            Cache(self._empty(batch, layer.attention), self._empty(batch, layer.attention)) for layer in decoder.spec.layers
        )
        self.first_logits = self._forward(input_ids, positions, self._segments[:, :length])

    def step(self, tokens: np.ndarray) -> np.ndarray:
        if self._used == self._capacity:
            raise ValueError(f"the cache's {self._capacity} slots are all used")
        self._segments[:, self._used] = 1
        self._used += 1
        positions = self._next[:, None].copy()
        self._next += 1
        return self._forward(tokens[:, None], positions, np.ones_like(positions))

    @torch.no_grad()
    def _forward(self, input_ids: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
        decoder = self._model.decoder
        device = decoder.device
        context = Context(
            tables=decoder.rope_tables(to_device(positions, device), int(positions.max(initial=0)) + 1),
            segments=to_device(segments, device),
            kv_segments=to_device(self._segments, device),
            caches=self._caches,
        )
        hidden = decoder.hidden(to_device(input_ids.astype(np.int32), device), context)
        return decoder.logits(hidden[:, -1]).cpu().numpy()

    def _empty(self, batch: int, attention: Attention) -> torch.Tensor:
        decoder, shape = self._model.decoder, (batch, self._capacity, attention.kv_heads, attention.head_dim)
        return torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
