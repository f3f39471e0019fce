"""Gated activation in plain torch, keeping gate and up only."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch.autograd.function import once_differentiable

from jaxsloth.kernels.gated_activation.contract import KINDS

CUBIC = 0.044715


def _activate(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate) of a float32 gate."""
    if kind == "silu":
        return torch.nn.functional.silu(gate)
    if kind == "relu":
        return torch.relu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def _derivative(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """act'(gate) of a float32 gate."""
    if kind == "silu":
        sigmoid = torch.sigmoid(gate)
        return sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if kind == "relu":
        return (gate > 0).float()
    if kind == "gelu":
        density = torch.exp(-0.5 * gate * gate) / math.sqrt(2.0 * math.pi)
        return 0.5 * torch.erfc(gate * -math.sqrt(0.5)) + gate * density
    root = math.sqrt(2.0 / math.pi)
    tanh = torch.tanh(root * (gate + CUBIC * gate**3))
    return 0.5 * (1.0 + tanh) + 0.5 * gate * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * CUBIC * gate * gate)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _activate(gate.float(), kind).to(gate.dtype) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy, wide = grads[0].float(), gate.float()
        dgate = (dy * up * _derivative(wide, ctx.kind)).to(gate.dtype) if ctx.needs_input_grad[0] else None
        dup = (dy * _activate(wide, ctx.kind)).to(up.dtype) if ctx.needs_input_grad[1] else None
        return dgate, dup, None


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")


@torch.no_grad()
def activate(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor, *, kind: str) -> None:
    """Writes ``act(gate)·up`` to h; all ``[rows, width]``, of any row stride."""
    h.copy_(_activate(gate.float(), kind).to(gate.dtype) * up)


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
    """Writes dgate and dup from dh and, where h is given, h itself; an output may be gate, up or dh. All ``[rows, width]``."""
    wide, grads = gate.float(), dh.float()
    act = _activate(wide, kind)
    found = grads * up * _derivative(wide, kind), grads * act, act.to(gate.dtype) * up
    dgate.copy_(found[0])
    dup.copy_(found[1])
    if h is not None:
        h.copy_(found[2])


def gated_activation(
    gate: Float[torch.Tensor, "*lead width"], up: Float[torch.Tensor, "*lead width"], *, kind: str
) -> Float[torch.Tensor, "*lead width"]:
    """``act(gate) * up`` in their dtype, act in float32.

    Raises:
        ValueError: kind is not one of the contract's `KINDS`.
    """
    check_kind(kind)
    return _GatedActivation.apply(gate, up, kind)
