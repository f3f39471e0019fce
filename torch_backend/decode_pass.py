"""One greedy token a row as a program without a host in it: captured once as a CUDA graph, replayed for every token.

Slot, positions and the token itself stay on the device, and each step leaves there what the next one reads. The products of NF4
layers that share their input are one `nf4_matvec`; adapters are added by two small products, from copies in the compute dtype
that `begin` takes. Residual sums and norms are one kernel (`Block.step`), rotation and cache write another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from jaxsloth.kernels.attention import torch_ops as attention_ops
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.few_rows import FewRows
from jaxsloth.torch_backend.run import StepRun

logger = logging.getLogger("jaxsloth.torch_backend")

CHUNK = 8  # tokens a row that are read at once; so many more are under way meanwhile
SLOTS = 256  # caches are rounded up to this, so that one program serves many requests
KEPT_BYTES = 2**30  # of caches, up to which a program waits for the next request


class DecodeProgram:
    """The program for `batch` rows and `capacity` slots. caches: (keys, values) a layer."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int, requested: str | None) -> None:
        device, spec = decoder.device, decoder.spec
        self._decoder, self._spec = decoder, spec
        self.batch, self.capacity = batch, capacity
        self._blocks = decoder.blocks
        self._few_rows = {group: FewRows(group, batch, decoder.dtype, requested) for group in decoder.groups()}
        self._attention: Any = attention_ops
        if device.type == "cuda":
            from jaxsloth.kernels.attention import triton_kernel

            self._attention = triton_kernel
        self._made_of = memory_of(decoder)
        self.caches = [
            tuple(
                torch.zeros(
                    batch, capacity, layer.attention.kv_heads, layer.attention.head_dim, dtype=decoder.dtype, device=device
                )
                for _ in range(2)
            )
            for layer in spec.layers
        ]
        self.cache_bytes = sum(t.numel() * t.element_size() for pair in self.caches for t in pair)
        self.first = torch.zeros(batch, dtype=torch.int32, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(capacity, batch, dtype=torch.int64, device=device)  # by the slot that was read last
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tried = device.type != "cuda"

    def serves(self, decoder: Decoder, batch: int, capacity: int) -> bool:
        """True where the program fits a request: enough slots and not four times too many, and every weight where it was."""
        fits = self.batch == batch and capacity <= self.capacity <= 4 * (capacity + SLOTS)
        return fits and self._spec == decoder.spec and self._made_of == memory_of(decoder)

    @torch.no_grad()
    def begin(self, lengths: np.ndarray, used: int) -> None:
        """Before the first token: `used` slots are written, of which the last lengths int32 ``[batch]`` of each row count."""
        for group in self._few_rows.values():
            group.begin()
        device = self.slot.device
        if not self._tried:
            with torch.cuda.device(device):
                self._capture()
        self.first.copy_(torch.from_numpy(used - lengths).to(device))
        self._positions.copy_(torch.from_numpy(lengths)[:, None].to(device))
        self.slot.fill_(used)

    def _capture(self) -> None:
        """Records the program, after a run that compiles its kernels; it goes on unrecorded where that fails."""
        self._tried = True
        self.slot.fill_(self.capacity - 1)
        self.first.fill_(self.capacity - 1)
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                self._run()
            torch.cuda.current_stream().wait_stream(beside)
            self.slot.fill_(self.capacity - 1)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
            self._graph = graph
        except torch.OutOfMemoryError:
            logger.warning("no CUDA graph for decoding: its memory does not fit; steps launch their kernels one by one")

    @torch.no_grad()
    def _run(self) -> None:
        decoder = self._decoder
        x, delta = decoder.model.embed_tokens(self._token), None
        tables = {
            rope: (cos.flatten(0, 1), sin.flatten(0, 1))
            for rope, (cos, sin) in decoder.rope_tables(self._positions, self.capacity).items()
        }
        run = StepRun(tables, self._few_rows, self.first, self.slot, self._attention)
        for block, cache in zip(self._blocks, self.caches, strict=True):
            x, delta = block.step(x, delta, cache, run)
        normed, *_ = decoder.model.norm.forward_keeping(x, delta)
        self._token.copy_(decoder.lm_head(normed).argmax(dim=-1))
        self._tokens.index_copy_(0, self.slot, self._token[None])
        self.slot.add_(1)
        self._positions.add_(1)

    def decode_chunks(self, tokens: np.ndarray, used: int, count: int) -> Iterator[np.ndarray]:
        """Appends tokens int ``[batch]`` to slot `used` and goes on from there; yields the `count` tokens a row that follow,
        int32 ``[batch, n]`` at a time. What is yielded has been followed by the next chunk's launch."""
        self._token.copy_(torch.from_numpy(tokens.astype(np.int64)))
        waiting: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        while count > 0 or waiting is not None:
            launched = None
            if count > 0:
                size = min(CHUNK, count)
                for _ in range(size):
                    if self._graph is None:
                        self._run()
                    else:
                        self._graph.replay()
                launched = _fetch(self._tokens[used : used + size])
                used, count = used + size, count - size
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = launched


def _fetch(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on its way to the host, and what tells that it has come."""
    if not tokens.is_cuda:
        return tokens.clone(), None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tokens.device))
    return host, event


def _arrived(tokens: torch.Tensor, event: torch.cuda.Event | None) -> np.ndarray:
    if event is not None:
        event.synchronize()
    return tokens.numpy().T.astype(np.int32)


def memory_of(decoder: Decoder) -> tuple[Any, ...]:
    """The memory that a recorded program reads: where every tensor lies and which adapters there are."""
    places = [tensor.data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers())]
    adapters = [(linear.scale, linear.lora_A is None) for linear in decoder.linears()]
    return tuple(places), tuple(adapters)
