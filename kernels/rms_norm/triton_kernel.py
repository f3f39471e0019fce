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
def forward_kernel(x, weight, y, rstd, hidden, eps, offset, PLAIN: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    values = tl.load(x + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    reciprocal = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / hidden + eps)
    tl.store(rstd + row, reciprocal)
    normalised = values * reciprocal
    # Llama rounds before it multiplies by the weight.
    rounded = normalised.to(x.dtype.element_ty).to(tl.float32)
    result = rounded * scale if PLAIN else normalised * (offset + scale)
    tl.store(y + row * hidden + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def backward_kernel(
    x,
    weight,
    rstd,
    dy,
    dx,
    dweight,
    rows,
    hidden,
    rows_each,
    offset,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
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
        normalised = tl.load(x + row * hidden + column, mask=inside, other=0.0).to(tl.float32) * reciprocal
        gradient = tl.load(dy + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_DWEIGHT:
            total += gradient * normalised
        if NEEDS_DX:
            g = gradient * scale
            mean = tl.sum(g * normalised, axis=0) / hidden
            result = reciprocal * (g - normalised * mean)
            tl.store(dx + row * hidden + column, result.to(dx.dtype.element_ty), mask=inside)
    if NEEDS_DWEIGHT:
        tl.store(dweight + program * hidden + column, total, mask=inside)


def _launch(width: int) -> dict[str, Any]:
    """16 values a thread, within what one program may have; no bit hangs on contraction here, and it is faster."""
    return {"num_warps": min(max(width // 512, 1), 32), "enable_fp_fusion": True}


def _programs(rows: int, device: torch.device) -> int:
    if device.type != "cuda":
        return min(rows, PROGRAMS_PER_PROCESSOR)
    return min(rows, PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        x = x.contiguous()
        hidden = x.shape[-1]
        rows = x.numel() // hidden
        width = triton.next_power_of_2(hidden)
        y = torch.empty_like(x)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        if rows > 0:
            with torch.cuda.device_of(x):
                forward_kernel[(rows,)](
                    x, weight, y, rstd, hidden, eps, offset, PLAIN=offset == 0.0, WIDTH=width, **_launch(width)
                )
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        hidden, rows = x.shape[-1], rstd.numel()
        width = triton.next_power_of_2(hidden)
        programs = _programs(rows, x.device)
        dx = torch.empty_like(x) if needs_dx else None
        parts = torch.empty(programs, hidden, dtype=torch.float32, device=x.device) if needs_dweight else None
        if rows > 0:
            with torch.cuda.device_of(x):
                # A pointer that is not needed is never written; x stands in for it.
                backward_kernel[(programs,)](
                    x,
                    weight,
                    rstd,
                    grads[0].contiguous(),
                    x if dx is None else dx,
                    x if parts is None else parts,
                    rows,
                    hidden,
                    triton.cdiv(rows, programs),
                    ctx.offset,
                    NEEDS_DX=needs_dx,
                    NEEDS_DWEIGHT=needs_dweight,
                    WIDTH=width,
                    **_launch(width),
                )
        dweight = None if parts is None else parts.sum(dim=0).to(weight.dtype)
        return dx, dweight, None, None


def rms_norm(
    x: Float[torch.Tensor, "*lead hidden"], weight: Float[torch.Tensor, " hidden"], *, eps: float, offset: float = 0.0
) -> Float[torch.Tensor, "*lead hidden"]:
    """As torch_ops' function of this name, on CUDA; hidden is at most the contract's `MAX_HIDDEN`."""
    return _RMSNorm.apply(x, weight, eps, offset)
