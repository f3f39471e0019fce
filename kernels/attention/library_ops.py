"""Attention through the libraries that torch carries: cuDNN where all rows are plain causal ones, flash attention where
documents are packed or a window cuts them, and for everything else the project's kernel where the registry chose it, or the
op's plain implementation.

Forward and backward are functions of their own here, so that a caller decides what is kept between them and where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

CUDNN_HEAD_DIM, FLASH_HEAD_DIM = 128, 256
KernelName = Literal["cudnn", "flash", "kernel", "general"]
Stats = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """Which tokens of a flat batch belong together.

    segments: int32 ``[batch, length]``. boundaries: int32 ``[documents + 1]``, where each document starts in the flat batch, or
    None where every row is one document, perhaps with padding behind it: a causal query never sees that. longest: the most
    tokens that a document has.
    """

    batch: int
    length: int
    segments: torch.Tensor
    boundaries: torch.Tensor | None = None
    longest: int = 0


def boundaries_of(segments: np.ndarray) -> np.ndarray | None:
    """int32 ``[documents + 1]`` from segments ``[batch, length]``; None where rows are single documents, padded behind or not.

    Padding counts as documents of its own. The last entry is repeated up to a power of two of documents, so that few counts
    occur: documents of no length.
    """
    rows, length = segments.shape
    padded = segments == 0
    if np.all(padded | (segments == segments[:, :1])) and np.all(np.diff(padded.astype(np.int8), axis=1) >= 0):
        return None
    starts = np.ones((rows, length), bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    found = np.flatnonzero(starts)
    count = 1 << int(len(found) - 1).bit_length()
    return np.concatenate([found, np.full(count + 1 - len(found), rows * length)]).astype(np.int32)


@dataclass(frozen=True)
class AttentionSettings:
    """What one layer's attention is: see the contract.

    general: the op's implementation, for what no library does. kernel: the module that it is of, where that has a `forward`
    and a `backward` of its own (flash_triton).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    general: Callable[..., torch.Tensor]
    kernel: ModuleType | None = None

    def kind(self, q: torch.Tensor, layout: Layout) -> KernelName:
        own: KernelName = "general" if self.kernel is None else "kernel"
        if not q.is_cuda or q.dtype == torch.float32 or not self.causal or self.soft_cap is not None or self.head_dim % 8:
            return own
        whole = self.window is None or self.window >= layout.length
        if layout.boundaries is None and whole and self.head_dim <= CUDNN_HEAD_DIM:
            return "cudnn"
        return "flash" if self.head_dim <= FLASH_HEAD_DIM else own


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: AttentionSettings, layout: Layout
) -> tuple[torch.Tensor, Stats]:
    """(the output ``[tokens, heads·head_dim]``, what `backward` needs beside it).

    q ``[tokens, heads·head_dim]``, k and v ``[tokens, kv_heads·head_dim]``, of any row stride.
    """
    kind = settings.kind(q, layout)
    if kind == "cudnn":
        heads = (_heads(t, settings, layout).transpose(1, 2) for t in (q, k, v))
        out, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, True, False, scale=settings.scale
        )
        log_sums, _, _, _, _, seed, offset, _ = rest
        return out.transpose(1, 2).reshape(q.shape[0], -1), (log_sums, seed, offset)
    if kind == "flash":
        bounds, longest = _bounds(layout, q.device)
        out, log_sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
            *(_heads(t, settings, None) for t in (q, k, v)),
            bounds,
            bounds,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=settings.scale,
            **_window(settings),
        )
        return out.reshape(q.shape[0], -1), (log_sums, state, unused)
    if kind == "kernel":
        assert settings.kernel is not None
        heads = (_heads(t, settings, layout) for t in (q, k, v))
        out, log_sums = settings.kernel.forward(*heads, settings.kernel.MaskSpec(**_options(settings, layout)))
        return out.reshape(q.shape[0], -1), (log_sums,)
    return _general(q, k, v, settings, layout), ()


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: Stats,
    settings: AttentionSettings,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, shaped as q, k and v."""
    kind = settings.kind(q, layout)
    if kind == "cudnn":
        log_sums, seed, offset = stats
        heads = [_heads(t, settings, layout).transpose(1, 2) for t in (dout, q, k, v, out)]
        length = layout.length
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *heads, log_sums, seed, offset, None, None, None, length, length, 0.0, True, scale=settings.scale
        )
        dq, dk, dv = (t.transpose(1, 2).reshape(q.shape[0], -1) for t in found)
        return dq, dk, dv
    if kind == "flash":
        bounds, longest = _bounds(layout, q.device)
        log_sums, state, unused = stats
        found = torch.ops.aten._flash_attention_backward(
            *(_heads(t, settings, None) for t in (dout, q, k, v, out)),
            log_sums,
            bounds,
            bounds,
            longest,
            longest,
            0.0,
            True,
            state,
            unused,
            scale=settings.scale,
            **_window(settings),
        )
        dq, dk, dv = (t.reshape(q.shape[0], -1) for t in found)
        return dq, dk, dv
    if kind == "kernel":
        assert settings.kernel is not None
        heads = [_heads(t, settings, layout) for t in (dout, q, k, v, out)]
        found = settings.kernel.backward(*heads, *stats, settings.kernel.MaskSpec(**_options(settings, layout)))
        dq, dk, dv = (t.reshape(q.shape[0], -1) for t in found)
        return dq, dk, dv
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again = _general(*leaves, settings, layout)
    dq, dk, dv = torch.autograd.grad(again, leaves, dout)
    return dq, dk, dv


def _heads(x: torch.Tensor, settings: AttentionSettings, layout: Layout | None) -> torch.Tensor:
    """``[batch, length, heads, head_dim]``, or ``[tokens, heads, head_dim]`` without a layout; no copy."""
    shape = (x.shape[0], -1, settings.head_dim) if layout is None else (layout.batch, layout.length, -1, settings.head_dim)
    return x.unflatten(0, shape[:2]).unflatten(2, shape[2:]) if layout is not None else x.unflatten(1, shape[1:])


def _bounds(layout: Layout, device: torch.device) -> tuple[torch.Tensor, int]:
    if layout.boundaries is not None:
        return layout.boundaries, layout.longest
    ends = torch.arange(0, (layout.batch + 1) * layout.length, layout.length, dtype=torch.int32, device=device)
    return ends, layout.length


def _window(settings: AttentionSettings) -> dict[str, Any]:
    if settings.window is None:
        return {}
    return {"window_size_left": settings.window - 1, "window_size_right": 0}


def _options(settings: AttentionSettings, layout: Layout) -> dict[str, Any]:
    """Arguments of the op that are not q, k and v."""
    plain = layout.boundaries is None and settings.causal
    return {
        "scale": settings.scale,
        "causal": settings.causal,
        "window": settings.window,
        "soft_cap": settings.soft_cap,
        "q_segments": None if plain else layout.segments,
    }


def _general(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: AttentionSettings, layout: Layout) -> torch.Tensor:
    out = settings.general(*(_heads(t, settings, layout) for t in (q, k, v)), **_options(settings, layout))
    return out.reshape(q.shape[0], -1)
