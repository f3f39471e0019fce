"""RMSNorm as Triton kernels: a row is held whole in registers, read once and written once.

Forward, a row a program: ``rstd = 1 / sqrt(mean(x²) + eps)``, ``y = x·rstd·(offset + w)``, rstd kept.
Backward, a run of rows a program, so that each sums its part of dweight in registers: with ``n = x·rstd`` and
``g = dy·(offset + w)``: ``dx = rstd·(g - n·mean(g·n))``, ``dweight = Σ dy·n``. The parts are added in a fixed order.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch.autograd.function import once_differentiable

# Programs of the backward for each multiprocessor: enough to hide the latency of a row, few enough partial sums.
PROGRAMS_PER_PROCESSOR = 4


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def forward_kernel(
    x,
    delta,
    weight,
    total,
    y,
    rstd,
    hidden,
    x_stride,
    delta_stride,
    total_stride,
    y_stride,
    eps,
    offset,
    ADDS: tl.constexpr,
    PLAIN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        # What is normalised is the sum as the next layer reads it.
        rounded_sum = (values + added).to(total.dtype.element_ty)
        tl.store(total + row * total_stride + column, rounded_sum, mask=inside)
        values = rounded_sum.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    reciprocal = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / hidden + eps)
    tl.store(rstd + row, reciprocal)
    normalised = values * reciprocal
    # Llama rounds before it multiplies by the weight.
    rounded = normalised.to(x.dtype.element_ty).to(tl.float32)
    result = rounded * scale if PLAIN else normalised * (offset + scale)
    tl.store(y + row * y_stride + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def backward_kernel(
    x,
    weight,
    rstd,
    dy,
    residual,
    dx,
    dweight,
    rows,
    hidden,
    x_stride,
    dy_stride,
    residual_stride,
    dx_stride,
    rows_each,
    offset,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # int64: the offset of an element passes 2**31 in a large batch.
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    scale = offset + tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for row in range(program * rows_each, tl.minimum(program * rows_each + rows_each, rows)):
        reciprocal = tl.load(rstd + row)
        normalised = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) * reciprocal
        gradient = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_DWEIGHT:
            total += gradient * normalised
        if NEEDS_DX:
            g = gradient * scale
            mean = tl.sum(g * normalised, axis=0) / hidden
            result = reciprocal * (g - normalised * mean)
            if ADDS:
                # Rounded before the sum, as two tensors added would be.
                rounded = result.to(dx.dtype.element_ty).to(tl.float32)
                result = rounded + tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + row * dx_stride + column, result.to(dx.dtype.element_ty), mask=inside)
    if NEEDS_DWEIGHT:
        tl.store(dweight + program * hidden + column, total, mask=inside)


def _launch(width: int) -> dict[str, Any]:
    """16 values a thread, within what one program may have; no bit hangs on contraction here, and it is faster."""
    return {"num_warps": min(max(width // 512, 1), 32), "enable_fp_fusion": True}


def _programs(rows: int, device: torch.device) -> int:
    if device.type != "cuda":
        return min(rows, PROGRAMS_PER_PROCESSOR)
    return min(rows, PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count)


@torch.no_grad()
def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    y: torch.Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """As torch_ops' function of this name."""
    rows, hidden = x.shape
    width = triton.next_power_of_2(hidden)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    delta, total = (x if t is None else t for t in (delta, total))  # never read or written where there is none
    if rows > 0:
        with torch.cuda.device_of(x):
            forward_kernel[(rows,)](
                x,
                delta,
                weight,
                total,
                y,
                rstd,
                hidden,
                x.stride(0),
                delta.stride(0),
                total.stride(0),
                y.stride(0),
                eps,
                offset,
                ADDS=delta is not x,
                PLAIN=offset == 0.0,
                WIDTH=width,
                **_launch(width),
            )
    return rstd


@torch.no_grad()
def add_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual: torch.Tensor | None,
    dx: torch.Tensor | None,
    *,
    offset: float = 0.0,
    needs_dweight: bool = False,
) -> torch.Tensor | None:
    """As torch_ops' function of this name."""
    rows, hidden = x.shape
    width = triton.next_power_of_2(hidden)
    programs = _programs(rows, x.device)
    parts = torch.empty(programs, hidden, dtype=torch.float32, device=x.device) if needs_dweight else None
    if rows > 0:
        with torch.cuda.device_of(x):
            # A pointer that is not needed is never followed; x stands in for it.
            written, added = x if dx is None else dx, x if residual is None else residual
            backward_kernel[(programs,)](
                x,
                weight,
                rstd,
                dy,
                added,
                written,
                x if parts is None else parts,
                rows,
                hidden,
                x.stride(0),
                dy.stride(0),
                added.stride(0),
                written.stride(0),
                triton.cdiv(rows, programs),
                offset,
                NEEDS_DX=dx is not None,
                NEEDS_DWEIGHT=needs_dweight,
                ADDS=residual is not None,
                WIDTH=width,
                **_launch(width),
            )
    return None if parts is None else parts.sum(dim=0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        rows = x.view(-1, x.shape[-1])
        rstd = add_norm(rows, None, weight, y.view(rows.shape), eps=eps, offset=offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs_dx else None
        rows = x.view(-1, x.shape[-1])
        dweight = add_norm_backward(
            grads[0].contiguous().view(rows.shape),
            rows,
            weight,
            rstd,
            None,
            None if dx is None else dx.view(rows.shape),
            offset=ctx.offset,
            needs_dweight=needs_dweight,
        )
        return dx, dweight, None, None


def rms_norm(
    x: Float[torch.Tensor, "*lead hidden"], weight: Float[torch.Tensor, " hidden"], *, eps: float, offset: float = 0.0
) -> Float[torch.Tensor, "*lead hidden"]:
    """As torch_ops' function of this name, on CUDA; hidden is at most the contract's `MAX_HIDDEN`."""
    return _RMSNorm.apply(x, weight, eps, offset)
