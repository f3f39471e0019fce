"""One greedy token a row as a program without a host in it: captured once as a CUDA graph, replayed for every token.

Slot, positions and the token itself stay on the device, and each step leaves there what the next one reads. The products of NF4
layers that share their input are one `nf4_matvec`; adapters are added by two small products, from copies in the compute dtype
that `begin` takes. Residual sums and norms are one kernel, rotation and cache write another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from jaxsloth.kernels.nf4.contract import MATVEC, NF4
from jaxsloth.kernels.registry import Facts, select
from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.layer_pass import Kernels
from jaxsloth.torch_backend.layers import Linear, Ops

logger = logging.getLogger("jaxsloth.torch_backend")

BURST = 8  # tokens a row that are read at once; so many more are under way meanwhile
SLOTS = 256  # caches are rounded up to this, so that one program serves many requests
KEPT_BYTES = 2**30  # of caches, up to which a program waits for the next request
WEIGHTS = 3  # that one nf4_matvec takes


class Products:
    """Linear layers that share their input, for few rows."""

    def __init__(self, linears: Sequence[Linear], rows: int, dtype: torch.dtype, requested: str | None) -> None:
        self._linears, self._dtype = linears, dtype
        device = linears[0].weight.device
        outs, in_ = [linear.shape[0] for linear in linears], linears[0].shape[1]
        self._starts = [sum(outs[:place]) for place in range(len(outs))]
        self._weights = [linear.base() for linear in linears]
        self._matvec = self._choose(rows, in_, requested)
        self._rank = sum(0 if linear.lora_A is None else linear.lora_A.shape[0] for linear in linears)
        self._a = torch.zeros(self._rank, in_, dtype=dtype, device=device)
        self._b = torch.zeros(self._rank, sum(outs), dtype=dtype, device=device)
        biased = any(linear.bias is not None for linear in linears)
        self._bias = torch.zeros(sum(outs), dtype=dtype, device=device) if biased else None

    def _choose(self, rows: int, in_: int, requested: str | None) -> Callable[..., torch.Tensor] | None:
        """nf4_matvec where it takes these weights together, else None."""
        weights = [weight for weight in self._weights if isinstance(weight, NF4)]
        alike = len({weight.nested is None for weight in weights}) == 1
        if len(weights) != len(self._linears) or not alike or len(weights) > WEIGHTS:
            return None
        sizes = {"rows": rows, "in": in_, "values": max(weight.shape[0] * weight.shape[1] for weight in weights)}
        facts = Facts(weights[0].codes.device.type, str(self._dtype).removeprefix("torch."), sizes)  # type: ignore[arg-type]
        chosen = select(MATVEC, "torch", facts, requested).implementation
        # Where the kernel refuses on a GPU, dequantizing there and a product are the faster way.
        return None if chosen.name == "torch" and facts.platform == "cuda" and requested is None else chosen.load()

    @torch.no_grad()
    def begin(self) -> None:
        """Takes over the present values of adapters and biases."""
        column = 0
        for start, linear in zip(self._starts, self._linears, strict=True):
            end = start + linear.shape[0]
            if linear.lora_A is not None and linear.lora_B is not None:
                rank = linear.lora_A.shape[0]
                self._a[column : column + rank] = linear.lora_A
                self._b[column : column + rank, start:end] = (linear.scale * linear.lora_B).T
                column += rank
            if linear.bias is not None and self._bias is not None:
                self._bias[start:end] = linear.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, in] -> [rows, sum of out]``."""
        if self._matvec is not None:
            y = self._matvec(x, self._weights, self._bias)
        else:
            parts = [linear._ops.lora_matmul(x, base) for linear, base in zip(self._linears, self._weights, strict=True)]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if self._bias is not None:
                y = y.add_(self._bias)
        return y if self._rank == 0 else y.addmm_(x @ self._a.T, self._b)


class LayerStep:
    """One block for one token a row: the residual stream comes and goes as x and what is yet to be added to it."""

    def __init__(
        self, block: Any, layer: specs.Layer, rows: int, dtype: torch.dtype, requested: str | None, modules: Modules
    ) -> None:
        def products(module: Any, *names: str) -> Products:
            return Products([getattr(module, name) for name in names if hasattr(module, name)], rows, dtype, requested)

        self._block, self._layer, self._modules = block, layer, modules
        self.qkv = products(block.self_attn, "qkv_proj", "q_proj", "k_proj", "v_proj")
        self.o = products(block.self_attn, "o_proj")
        self.gate_up = products(block.mlp, "gate_up_proj", "gate_proj", "up_proj")
        self.down = products(block.mlp, "down_proj")

    @property
    def products(self) -> tuple[Products, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def __call__(
        self, x: torch.Tensor, delta: torch.Tensor | None, tables: Any, keys: torch.Tensor, values: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, block = self._layer, self._block
        if layer.placement == "pre" and layer.attention_norm is not None:
            x, normed = self._modules.add_norm(x, delta, block.input_layernorm.weight, layer.attention_norm)
            attended = self._attend(normed, tables, keys, values, step)
            x, normed = self._modules.add_norm(x, attended, block.post_attention_layernorm.weight, layer.mlp_norm)
            return x, self._mlp(normed)
        x = x if delta is None else x + delta
        attended = self._attend(block.input_layernorm(x), tables, keys, values, step)
        if layer.placement == "pre":
            x = x + attended
            return x, self._mlp(block.post_attention_layernorm(x))
        x = x + block.post_attention_layernorm(attended)
        return x, block.post_feedforward_layernorm(self._mlp(block.pre_feedforward_layernorm(x)))

    def _attend(self, normed: torch.Tensor, tables: Any, keys: torch.Tensor, values: torch.Tensor, step: Step) -> torch.Tensor:
        own, attention = self._layer.attention, self._block.self_attn
        width = own.kv_heads * own.head_dim
        q, k, v = self.qkv(normed).split([own.heads * own.head_dim, width, width], dim=1)
        if own.qk_norm is not None:
            q, k = (
                norm(t.reshape(t.shape[0], -1, own.head_dim)).flatten(1)
                for norm, t in ((attention.q_norm, q), (attention.k_norm, k))
            )
        turning = None if own.rope is None else tables[own.rope]
        self._modules.attention.append(q, k, v, turning, keys, values, step.slot)
        out = self._modules.attention.attend(
            q, keys, values, step.first, step.slot, scale=own.scale, window=own.window, soft_cap=own.soft_cap
        )
        return self.o(out)

    def _mlp(self, normed: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(normed).chunk(2, dim=1)
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        self._modules.kernels.activation.activate(gate, up, h, kind=self._layer.mlp.activation)
        return self.down(h)


class Modules:
    """The elementwise kernels of a device."""

    attention: ModuleType

    def __init__(self, ops: Ops, device: torch.device) -> None:
        from jaxsloth.kernels.attention import torch_ops as attention

        self.kernels, self.attention = Kernels.of(ops), attention
        if device.type == "cuda":
            from jaxsloth.kernels.attention import triton_kernel as attention

            self.attention = attention

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, norm: specs.Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, the norm of it)."""
        total, normed = x if delta is None else torch.empty_like(x), torch.empty_like(x)
        kept = None if delta is None else total
        self.kernels.norm.add_norm(x, delta, weight, normed, eps=norm.eps, offset=norm.weight_offset, total=kept)
        return total, normed


class Step:
    """The program for `batch` rows and `capacity` slots. caches: (keys, values) a layer."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int, requested: str | None) -> None:
        device, spec = decoder.device, decoder.spec
        self._decoder, self._spec = decoder, spec
        self.batch, self.capacity = batch, capacity
        self._modules = Modules(decoder.ops, device)
        self._layers = [
            LayerStep(block, layer, batch, decoder.dtype, requested, self._modules)
            for block, layer in zip(decoder.model.layers, spec.layers, strict=True)
        ]
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
        self._said = torch.zeros(capacity, batch, dtype=torch.int64, device=device)  # by the slot that was read last
        self._scale = torch.tensor(spec.embedding.scale, dtype=decoder.dtype, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tried = device.type != "cuda"

    def serves(self, decoder: Decoder, batch: int, capacity: int) -> bool:
        """Whether the program fits a request: enough slots and not four times too many, and every weight where it was."""
        fits = self.batch == batch and capacity <= self.capacity <= 4 * (capacity + SLOTS)
        return fits and self._spec == decoder.spec and self._made_of == memory_of(decoder)

    @torch.no_grad()
    def begin(self, lengths: np.ndarray, used: int) -> None:
        """Before the first token: `used` slots are written, of which the last lengths int32 ``[batch]`` of each row count."""
        for layer in self._layers:
            for products in layer.products:
                products.begin()
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
        decoder, norm = self._decoder, self._spec.norm
        assert norm is not None
        x = torch.nn.functional.embedding(self._token, decoder.model.embed_tokens.weight).to(decoder.dtype)
        if self._spec.embedding.scale != 1.0:
            x = x * self._scale
        tables = {
            rope: tuple(table.flatten(0, 1) for table in pair)
            for rope, pair in decoder.rope_tables(self._positions, self.capacity).items()
        }
        delta = None
        for layer, (keys, values) in zip(self._layers, self.caches, strict=True):
            x, delta = layer(x, delta, tables, keys, values, self)
        _, normed = self._modules.add_norm(x, delta, decoder.model.norm.weight, norm)
        self._token.copy_(decoder.logits(normed).argmax(dim=-1))
        self._said.index_copy_(0, self.slot, self._token[None])
        self.slot.add_(1)
        self._positions.add_(1)

    def say(self, tokens: np.ndarray, used: int, count: int) -> Iterator[np.ndarray]:
        """Appends tokens int ``[batch]`` to slot `used` and goes on from there; yields the `count` tokens a row that follow,
        int32 ``[batch, n]`` at a time. What is yielded has been followed by the next burst's launch."""
        self._token.copy_(torch.from_numpy(tokens.astype(np.int64)))
        waiting: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        while count > 0 or waiting is not None:
            launched = None
            if count > 0:
                size = min(BURST, count)
                for _ in range(size):
                    if self._graph is None:
                        self._run()
                    else:
                        self._graph.replay()
                launched = _fetch(self._said[used : used + size])
                used, count = used + size, count - size
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = launched


def _fetch(said: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on its way to the host, and what tells that it has come."""
    if not said.is_cuda:
        return said.clone(), None
    host = torch.empty(said.shape, dtype=said.dtype, pin_memory=True)
    host.copy_(said, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(said.device))
    return host, event


def _arrived(said: torch.Tensor, event: torch.cuda.Event | None) -> np.ndarray:
    if event is not None:
        event.synchronize()
    return said.numpy().T.astype(np.int32)


def memory_of(decoder: Decoder) -> tuple[Any, ...]:
    """What a recorded program depends on: where every tensor lies and which adapters there are."""
    places = [tensor.data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers())]
    adapters = [(linear.scale, linear.lora_A is None) for linear in decoder.linears()]
    return tuple(places), tuple(adapters)
