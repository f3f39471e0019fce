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


def _slope(gate: torch.Tensor, kind: str) -> torch.Tensor:
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
        dgate = (dy * up * _slope(wide, ctx.kind)).to(gate.dtype) if ctx.needs_input_grad[0] else None
        dup = (dy * _activate(wide, ctx.kind)).to(up.dtype) if ctx.needs_input_grad[1] else None
        return dgate, dup, None


def gated_activation(
    gate: Float[torch.Tensor, "*lead width"], up: Float[torch.Tensor, "*lead width"], *, kind: str
) -> Float[torch.Tensor, "*lead width"]:
    """``act(gate) * up`` in their dtype, act in float32.

    Raises:
        ValueError: kind is not one of the contract's `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    return _GatedActivation.apply(gate, up, kind)
