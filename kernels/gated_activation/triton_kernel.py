"""Gated activation as Triton kernels: one pass forward, one pass backward that can overwrite what it reads.

Forward ``h = act(gate)·up``; backward, from dh: ``dgate = dh·up·act'(gate)``, ``dup = dh·act(gate)``, and h again, which the
gradient of the next layer's LoRA-A needs. act is float32, rounded before it meets up, as transformers does.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch.autograd.function import once_differentiable

from jaxsloth.kernels.gated_activation.torch_ops import check_kind

BLOCK = 1024
LAUNCH = {"num_warps": 4}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def _act_and_derivative(g, KIND: tl.constexpr):
    """(act(g), act'(g)) of a float32 g."""
    if KIND == "silu":
        sigmoid = tl.sigmoid(g)
        return g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid))
    if KIND == "relu":
        return tl.maximum(g, 0.0), tl.where(g > 0.0, 1.0, 0.0)
    if KIND == "gelu":
        half = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * half, half + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
    tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
    derivative = 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    return 0.5 * g * (1.0 + tanh), derivative


@triton.jit
@no_type_check
def forward_kernel(gate, up, h, width, gate_stride, up_stride, h_stride, KIND: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    act, _ = _act_and_derivative(g.to(tl.float32), KIND)
    tl.store(h + row * h_stride + column, (act.to(g.dtype).to(tl.float32) * u).to(h.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def backward_kernel(
    gate,
    up,
    dh,
    dgate,
    dup,
    h,
    width,
    gate_stride,
    up_stride,
    dh_stride,
    dgate_stride,
    dup_stride,
    h_stride,
    KIND: tl.constexpr,
    WRITES_H: tl.constexpr,
    SIZE: tl.constexpr,
):
    # An output may be an input: a program has read all of its elements before it writes any.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < width
    raw = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    act, derivative = _act_and_derivative(raw.to(tl.float32), KIND)
    rounded = act.to(raw.dtype).to(tl.float32)
    tl.store(dgate + row * dgate_stride + column, (d * u * derivative).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * dup_stride + column, (d * act).to(dup.dtype.element_ty), mask=inside)
    if WRITES_H:
        tl.store(h + row * h_stride + column, (rounded * u).to(h.dtype.element_ty), mask=inside)


@torch.no_grad()
def activate(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor, *, kind: str) -> None:
    """As torch_ops' function of this name."""
    rows, width = gate.shape
    if rows == 0 or width == 0:
        return
    with torch.cuda.device_of(gate):
        forward_kernel[(rows, triton.cdiv(width, BLOCK))](
            gate, up, h, width, gate.stride(0), up.stride(0), h.stride(0), KIND=kind, SIZE=BLOCK, **LAUNCH
        )


@torch.no_grad()
def activate_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    dh: torch.Tensor,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    h: torch.Tensor | None,
    *,
    kind: str,
) -> None:
    """As torch_ops' function of this name."""
    rows, width = gate.shape
    if rows == 0 or width == 0:
        return
    written = dh if h is None else h
    with torch.cuda.device_of(gate):
        backward_kernel[(rows, triton.cdiv(width, BLOCK))](
            gate,
            up,
            dh,
            dgate,
            dup,
            written,
            width,
            *(tensor.stride(0) for tensor in (gate, up, dh, dgate, dup, written)),
            KIND=kind,
            WRITES_H=h is not None,
            SIZE=BLOCK,
            **LAUNCH,
        )


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        activate(_rows(gate), _rows(up), _rows(h), kind=kind)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = (_rows(saved) for saved in ctx.saved_tensors)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        activate_backward(gate, up, _rows(grads[0]), dgate, dup, None, kind=ctx.kind)
        shape = grads[0].shape
        return dgate.view(shape), dup.view(shape), None


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def gated_activation(
    gate: Float[torch.Tensor, "*lead width"], up: Float[torch.Tensor, "*lead width"], *, kind: str
) -> Float[torch.Tensor, "*lead width"]:
    """As torch_ops' function of this name, on CUDA."""
    check_kind(kind)
    return _GatedActivation.apply(gate, up, kind)
