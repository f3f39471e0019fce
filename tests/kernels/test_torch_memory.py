"""What the torch ops keep for the backward, and how much they hold at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jaxsloth.kernels.dropout.contract import module_key
from jaxsloth.kernels.gated_activation.torch_ops import gated_activation
from jaxsloth.kernels.linear_cross_entropy import torch_ops as loss_torch
from jaxsloth.kernels.lora_matmul import torch_ops as lora_torch
from jaxsloth.kernels.lora_matmul.contract import Dropout
from jaxsloth.kernels.nf4 import torch_ops as nf4_torch
from jaxsloth.kernels.rms_norm.torch_ops import rms_norm
from jaxsloth.kernels.rope.torch_ops import rope


def saved_by(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[tuple[torch.dtype, tuple[int, ...]]]]:
    """The result, and the dtype and shape of every tensor that autograd keeps for its backward."""
    kept: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, kept


class LargestAllocation(TorchDispatchMode):
    """Records the largest number of values in a tensor that any operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.values = max(self.values, tensor.numel())
        return result


def normal(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


OUT, IN, RANK = 96, 64, 4


@pytest.mark.parametrize("nested", [False, True])
def test_lora_matmul_keeps_codes_not_the_weight(monkeypatch, nested):
    base = nf4_torch.quantize(normal(OUT, IN), nested=nested)
    dense: list[weakref.ref] = []
    resolve = lora_torch.resolve

    def watched(*args: Any) -> Callable[..., torch.Tensor]:
        def dequantize(*inner: Any) -> torch.Tensor:
            weight = resolve(*args)(*inner)
            dense.append(weakref.ref(weight))
            return weight

        return dequantize

    monkeypatch.setattr(lora_torch, "resolve", watched)
    x, a, b = normal(2, 3, IN, grad=True), normal(RANK, IN, grad=True), normal(OUT, RANK, grad=True)
    bias = normal(OUT, grad=True)
    y, kept = saved_by(lambda: lora_torch.lora_matmul(x, base, a, b, scale=2.0, bias=bias))
    assert sorted(shape for _, shape in kept) == sorted([(2, 3, IN), (RANK, IN), (OUT, RANK)])
    gc.collect()
    assert [reference() for reference in dense] == [None]
    y.sum().backward()
    gc.collect()
    assert [reference() for reference in dense] == [None, None]


def test_a_frozen_layer_keeps_nothing_of_x():
    base = nf4_torch.quantize(normal(OUT, IN))
    x = normal(2, 3, IN, grad=True)
    _, kept = saved_by(lambda: lora_torch.lora_matmul(x, base))
    assert kept == []


def test_a_dropout_mask_is_drawn_again():
    x, a, b = normal(2, 3, IN, grad=True), normal(RANK, IN, grad=True), normal(OUT, RANK, grad=True)
    dropout = Dropout(0.5, torch.tensor(module_key(0, 0, "m")), torch.arange(2))
    _, kept = saved_by(lambda: lora_torch.lora_matmul(x, normal(OUT, IN), a, b, dropout=dropout))
    assert sorted(shape for _, shape in kept) == sorted([(2, 3, IN), (RANK, IN), (OUT, RANK)])


def test_no_gradient_of_x_where_none_is_asked_for(monkeypatch):
    base = nf4_torch.quantize(normal(OUT, IN))
    a, b = normal(RANK, IN, grad=True), normal(OUT, RANK, grad=True)
    y = lora_torch.lora_matmul(normal(2, 3, IN), base, a, b)
    monkeypatch.setattr(lora_torch, "_dense", lambda *_: pytest.fail("the base was rebuilt for a gradient that nobody wants"))
    y.sum().backward()
    assert a.grad is not None and b.grad is not None


@pytest.mark.parametrize("per_token", [False, True])
def test_logits_never_exist_whole_and_only_the_gradient_of_hidden_is_kept(per_token):
    tokens, width, vocab, chunk = 40, 8, 512, 10
    hidden, weight = normal(tokens, width, grad=True), normal(vocab, width)
    targets = torch.arange(tokens)
    with LargestAllocation() as largest:
        loss, kept = saved_by(
            lambda: loss_torch.linear_cross_entropy(hidden, weight, targets, chunk=chunk, per_token=per_token)
        )
        loss.sum().backward()
    assert kept == [(torch.float32, (tokens, width))]
    assert largest.values == chunk * vocab
    assert weight.grad is None


def test_the_chosen_chunk_bounds_the_logits(monkeypatch):
    monkeypatch.setattr(loss_torch, "LOGITS_AT_ONCE", 2**14)
    hidden, weight, targets = normal(100, 8, grad=True), normal(512, 8), torch.arange(100)
    with LargestAllocation() as largest:
        loss_torch.linear_cross_entropy(hidden, weight, targets)
    assert largest.values == 2**14


def test_without_gradients_none_is_formed():
    hidden, weight = normal(40, 300, grad=True), normal(16, 300)
    with LargestAllocation() as largest, torch.no_grad():
        loss_torch.linear_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.int64), chunk=40)
    assert largest.values == 40 * 16


def test_the_small_ops_keep_what_their_contracts_say():
    x, weight = normal(6, 32, grad=True), normal(32, grad=True)
    _, kept = saved_by(lambda: rms_norm(x, weight, eps=1e-5))
    assert sorted(shape for _, shape in kept) == [(6, 1), (6, 32), (32,)]
    gate, up = normal(6, 32, grad=True), normal(6, 32, grad=True)
    _, kept = saved_by(lambda: gated_activation(gate, up, kind="silu"))
    assert [shape for _, shape in kept] == [(6, 32), (6, 32)]
    heads, cos, sin = normal(2, 5, 3, 8, grad=True), normal(2, 5, 4), normal(2, 5, 4)
    _, kept = saved_by(lambda: rope(heads, cos, sin))
    assert [shape for _, shape in kept] == [(2, 5, 4), (2, 5, 4)]


def test_quantizing_takes_a_slice_at_a_time(monkeypatch):
    monkeypatch.setattr(nf4_torch, "SLICE", 1024)
    weight = normal(256, 64).bfloat16()
    with LargestAllocation() as largest:
        quantized = nf4_torch.quantize(weight)
    # The codes of the whole weight are the result; beside them only slices are made.
    assert largest.values == quantized.codes.numel() == 8 * 1024
    smaller = nf4_torch.quantize(weight[:4])
    assert torch.equal(quantized.codes[:128], smaller.codes)
