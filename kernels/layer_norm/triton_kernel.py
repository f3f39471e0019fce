"""LayerNorm as Triton kernels: a row is held whole in registers, read once and written once.

Forward, a row a program: the mean, then the variance around it. Backward, a run of rows a program, so that each sums its part
of dweight and dbias in registers; the parts are added in a fixed order. The formulas are the contract's.
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
def forward_kernel(x, weight, bias, y, mean, rstd, hidden, eps, BIASED: tl.constexpr, WIDTH: tl.constexpr):
    # int64: the offset of an element passes 2**31 in a large batch.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    values = tl.load(x + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
    average = tl.sum(values, axis=0) / hidden
    centred = tl.where(inside, values - average, 0.0)
    reciprocal = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / hidden + eps)
    tl.store(mean + row, average)
    tl.store(rstd + row, reciprocal)
    result = centred * reciprocal * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * hidden + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def backward_kernel(
    x,
    weight,
    mean,
    rstd,
    dy,
    dx,
    dweight,
    dbias,
    rows,
    hidden,
    rows_each,
    NEEDS_DX: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < hidden
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total, shift = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for row in range(program * rows_each, tl.minimum(program * rows_each + rows_each, rows)):
        reciprocal = tl.load(rstd + row)
        values = tl.load(x + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
        normalised = tl.where(inside, (values - tl.load(mean + row)) * reciprocal, 0.0)
        gradient = tl.load(dy + row * hidden + column, mask=inside, other=0.0).to(tl.float32)
        if NEEDS_DWEIGHT:
            total += gradient * normalised
        if NEEDS_DBIAS:
            shift += gradient
        if NEEDS_DX:
            g = gradient * scale
            along = tl.sum(g * normalised, axis=0) / hidden
            result = reciprocal * (g - tl.sum(g, axis=0) / hidden - normalised * along)
            tl.store(dx + row * hidden + column, result.to(dx.dtype.element_ty), mask=inside)
    if NEEDS_DWEIGHT:
        tl.store(dweight + program * hidden + column, total, mask=inside)
    if NEEDS_DBIAS:
        tl.store(dbias + program * hidden + column, shift, mask=inside)


def launch(width: int) -> dict[str, Any]:
    """16 values a thread, within what one program may have."""
    return {"num_warps": min(max(width // 512, 1), 32)}


def _programs(rows: int, device: torch.device) -> int:
    if device.type != "cuda":
        return min(rows, PROGRAMS_PER_PROCESSOR)
    return min(rows, PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        x = x.contiguous()
        y, hidden = torch.empty_like(x), x.shape[-1]
        rows, width = x.numel() // hidden, triton.next_power_of_2(hidden)
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        if rows > 0:
            with torch.cuda.device_of(x):
                # A bias that there is not is never read; the weight stands in for it.
                shift = weight if bias is None else bias
                settings = {"BIASED": bias is not None, "WIDTH": width, **launch(width)}
                forward_kernel[(rows,)](x, weight, shift, y, mean, rstd, hidden, eps, **settings)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        dy, hidden, rows = grads[0].contiguous(), x.shape[-1], mean.shape[0]
        programs, width = _programs(rows, x.device), triton.next_power_of_2(hidden)
        dx = torch.empty_like(x) if needs_dx else None
        dweight, dbias = (
            torch.empty(programs, hidden, dtype=torch.float32, device=x.device) if needed else None
            for needed in (needs_dweight, needs_dbias)
        )
        if rows > 0:
            with torch.cuda.device_of(x):
                # A pointer that is not needed is never followed; x stands in for it.
                outs = [x if out is None else out for out in (dx, dweight, dbias)]
                needs = {"NEEDS_DX": needs_dx, "NEEDS_DWEIGHT": needs_dweight, "NEEDS_DBIAS": needs_dbias}
                sizes = [rows, hidden, triton.cdiv(rows, programs)]
                arguments = [x, weight, mean, rstd, dy, *outs, *sizes]
                backward_kernel[(programs,)](*arguments, **needs, WIDTH=width, **launch(width))
        return (
            dx,
            None if dweight is None else dweight.sum(dim=0).to(weight.dtype),
            None if dbias is None else dbias.sum(dim=0).to(ctx.bias_dtype),
            None,
        )


def layer_norm(
    x: Float[torch.Tensor, "*lead hidden"],
    weight: Float[torch.Tensor, " hidden"],
    bias: Float[torch.Tensor, " hidden"] | None = None,
    *,
    eps: float,
) -> Float[torch.Tensor, "*lead hidden"]:
    """As torch_ops' function of this name, on CUDA; hidden is at most the contract's `MAX_HIDDEN`."""
    return _LayerNorm.apply(x, weight, bias, eps)
