"""The floor that a device has for a step: its matrix products and its attention alone, on random data, and nothing around them.

No adapters, norms, activations, dequantization or optimizer; so nothing is trained, and losses and gradients are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.peers.torch_loop import DTYPES, device, limit_memory, peak_memory, synchronize
from benchmarks.work import Runner, Work, specs
from jaxsloth.models.names import layer_linears
from jaxsloth.models.spec import ModelSpec

HEAD_CHUNK = 2048  # tokens whose logits exist at a time
# The products that each mode runs again: none, all whose output the backward needs, or the two too large to offload.
RECOMPUTED = {
    "none": (),
    "full": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
    "offload": ("gate_proj", "up_proj"),
}
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Floor:
    """See `Runner`. The layers share one layer's weights, which are too large for the caches anyway."""

    framework: Literal["torch", "jax"] = "torch"

    def __init__(self, spec: ModelSpec, work: Work) -> None:
        limit_memory(work)
        self._layers, self._count = len(spec.layers), work.batch * work.length
        self._dtype = DTYPES[work.dtype]
        self._weights = {
            linear.name.rpartition(".")[2]: self._random(linear.out_features, linear.in_features)
            for linear in layer_linears(spec, 0)
        }
        self._head = self._random(spec.embedding.vocab, spec.hidden)
        self._recomputed = RECOMPUTED[work.checkpointing]
        widths = {side for weight in self._weights.values() for side in weight.shape}
        self._activations = {width: self._random(self._count, width) for width in widths}
        attention = spec.layers[0].attention
        heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
        self._qkv = [
            self._random(work.batch, count, work.length, size).requires_grad_() for count in (heads, kv_heads, kv_heads)
        ]
        self._dy = self._random(work.batch, heads, work.length, size)
        self._attends_twice = work.checkpointing == "full"
        synchronize()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device(), dtype=self._dtype)

    def step(self, ids: np.ndarray) -> float:
        """A layer's attention runs its forward where its backward runs, since autograd pairs the two; twice if recomputed."""
        for _ in range(self._layers):
            self._products(tuple(self._weights))
            if self._attends_twice:
                self._attention(backward=False)
        for start in range(0, self._count, HEAD_CHUNK):
            hidden = self._activations[self._head.shape[1]][start : start + HEAD_CHUNK]
            torch.mm(torch.mm(hidden, self._head.T), self._head)
        for _ in range(self._layers):
            self._products(self._recomputed)
            for weight in self._weights.values():
                torch.mm(self._activations[weight.shape[0]], weight)
            self._attention(backward=True)
        synchronize()
        return 0.0

    def _products(self, names: Sequence[str]) -> None:
        for name in names:
            torch.mm(self._activations[self._weights[name].shape[1]], self._weights[name].T)

    def _attention(self, backward: bool) -> None:
        with sdpa_kernel(BACKENDS, set_priority=True), torch.set_grad_enabled(backward):
            q, k, v = self._qkv
            output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if backward:
                torch.autograd.grad(output, self._qkv, self._dy)

    def gradients(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {}

    def peak_memory(self) -> int | None:
        return peak_memory()


def build(folder: Path, work: Work) -> Runner:
    """The checkpoint's weights play no part: products of random numbers take as long as any."""
    del folder
    return Floor(specs(work)[0], work)
