"""One token a row as a program without a host in it: captured as two CUDA graphs, replayed for every token.

The first runs the layers and leaves logits; the second, of which there is one a `Variant`, chooses from them. Slot, positions
and the token itself stay on the device, and each step leaves there what the next one reads. The products of NF4 layers that
share their input are one `nf4_matvec`; adapters are added by two small products, from copies in the compute dtype that `begin`
takes. Residual sums and norms are one kernel (`Block.step`), rotation and cache write another.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from jaxsloth.kernels.attention import torch_ops as attention_ops
from jaxsloth.sampling import Sampling, Variant
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.few_rows import FewRows
from jaxsloth.torch_backend.run import StepRun
from jaxsloth.torch_backend.sampling import Sampler

logger = logging.getLogger("jaxsloth.torch_backend")

CHUNK = 8  # tokens a row that are read at once; so many more are under way meanwhile
SLOTS = 256  # caches are rounded up to this, so that one program serves many requests
KEPT_BYTES = 2**30  # of caches, up to which a program waits for the next request; on a GPU also up to a part of its memory
KEPT_SHARE = 1 / 8
VARIANTS_KEPT = 8  # ways of choosing that a program remembers


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
        self.positions = torch.zeros(batch, dtype=torch.int32, device=device)
        self._token = torch.zeros(batch, dtype=torch.int64, device=device)
        self._logits = torch.empty(0)  # where the layers' graph leaves them
        self._said = torch.zeros(capacity + 1, batch, dtype=torch.int64, device=device)  # by slot
        self._samplers: OrderedDict[Variant, tuple[Sampler, torch.cuda.CUDAGraph | None]] = OrderedDict()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._records = device.type == "cuda"
        self.recorded = 0  # graphs, in all

    def serves(self, decoder: Decoder, batch: int, capacity: int) -> bool:
        """True where the program fits a request: enough slots and not four times too many, and every weight where it was."""
        fits = self.batch == batch and capacity <= self.capacity <= 4 * (capacity + SLOTS)
        return fits and self._spec == decoder.spec and self._made_of == memory_of(decoder)

    @torch.no_grad()
    def begin(
        self, sampling: Sampling, variant: Variant, logits: torch.Tensor, ids: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Chooses the first token, int64 ``[batch]``.

        logits ``[batch, vocab]`` follow ids int ``[batch, used]`` (`Sampler.begin`), of which the last lengths int32
        ``[batch]`` count in the caches.
        """
        for group in self._few_rows.values():
            group.begin()
        device, used = self.slot.device, ids.shape[1]
        sampler = self._sampler(variant)
        if self._records:
            with torch.cuda.device(device):
                self._record(sampler)
        sampler.begin(sampling, ids, lengths)
        self.first.copy_(torch.from_numpy(used - lengths).to(device))
        self.positions.copy_(torch.from_numpy(lengths).to(device))
        self.slot.fill_(used)
        said, token = sampler.choose(logits, self.slot, self.positions)
        self._token.copy_(token)
        return said.cpu().numpy()

    def _sampler(self, variant: Variant) -> Sampler:
        """The buffers of a way of choosing."""
        if variant not in self._samplers:
            vocab = self._spec.embedding.vocab
            self._samplers[variant] = Sampler(variant, self.batch, self.capacity, vocab, self.slot.device), None
            if len(self._samplers) > VARIANTS_KEPT:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(variant)
        return self._samplers[variant][0]

    def _record(self, sampler: Sampler) -> None:
        """Records what is not yet, each after a run that compiles its kernels; all goes on unrecorded where that fails."""
        try:
            if self._graph is None:
                self._graph = self._captured(self._append)
            if self._samplers[sampler.variant][1] is None:
                self._samplers[sampler.variant] = sampler, self._captured(lambda: self._choose(sampler))
        except torch.OutOfMemoryError:
            self._records = False
            logger.warning("no CUDA graph for decoding: its memory does not fit; steps launch their kernels one by one")

    def _captured(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self.slot.fill_(self.capacity - 1)
        self.first.fill_(self.capacity - 1)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            function()
        torch.cuda.current_stream().wait_stream(beside)
        self.slot.fill_(self.capacity - 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        self.recorded += 1
        return graph

    @torch.no_grad()
    def _append(self) -> None:
        """Runs the layers over the token; slot and positions are the next one's then."""
        decoder = self._decoder
        x, delta = decoder.model.embed_tokens(self._token), None
        tables = {
            rope: (cos.flatten(0, 1), sin.flatten(0, 1))
            for rope, (cos, sin) in decoder.rope_tables(self.positions[:, None], self.capacity).items()
        }
        run = StepRun(tables, self._few_rows, self.first, self.slot, self._attention)
        for block, cache in zip(self._blocks, self.caches, strict=True):
            x, delta = block.step(x, delta, cache, run)
        normed, *_ = decoder.model.norm.forward_keeping(x, delta)
        self._logits = decoder.lm_head(normed)
        self.slot.add_(1)
        self.positions.add_(1)

    @torch.no_grad()
    def _choose(self, sampler: Sampler) -> None:
        said, token = sampler.choose(self._logits, self.slot, self.positions)
        self._said.index_copy_(0, self.slot, said[None])
        self._token.copy_(token)

    def decode_chunks(self, variant: Variant, used: int, count: int) -> Iterator[np.ndarray]:
        """Appends the chosen token to slot `used` and goes on from there; yields the `count` tokens a row that follow, int32
        ``[batch, n]`` at a time. What is yielded has been followed by the next chunk's launch."""
        sampler, graph = self._samplers[variant]
        waiting: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        while count > 0 or waiting is not None:
            launched = None
            if count > 0:
                size = min(CHUNK, count)
                for _ in range(size):
                    if self._graph is None or graph is None or not self._records:
                        self._append()
                        self._choose(sampler)
                    else:
                        self._graph.replay()
                        graph.replay()
                launched = _fetch(self._said[used + 1 : used + 1 + size])
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
