"""NF4 in plain torch, on any device, a bounded slice of the weight at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float, Float32, UInt8

from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4, Nested, dynamic_code, step_lookup

# Values handled at once: a whole number of blocks and of bytes. 4 Mi float32 values are 16 MiB a temporary.
SLICE = 2**22
SMALLEST_ABSMAX = 1e-38


@cache
def _midpoints(device: torch.device) -> torch.Tensor:
    code = torch.from_numpy(CODE)
    return ((code[:-1] + code[1:]) / 2).to(device)


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """float32 ``[256, 2]``: the two values that a byte of codes stands for."""
    byte = torch.arange(256)
    code = torch.from_numpy(CODE)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).to(device)


@cache
def dynamic_code_on(device: torch.device, signed: bool = True) -> torch.Tensor:
    return torch.from_numpy(dynamic_code(signed=signed)).to(device)


@cache
def step_lookup_on(device: torch.device, signed: bool = True) -> torch.Tensor:
    return torch.from_numpy(step_lookup(signed=signed)).to(device)


def _quantize_slice(
    values: Float32[torch.Tensor, " n"], codes: UInt8[torch.Tensor, " bytes"], absmax: Float32[torch.Tensor, " blocks"]
) -> None:
    """Fill `codes` and `absmax` with the quantization of `values`; only the weight's last slice may end inside a block."""
    size = values.numel()
    whole = size - size % BLOCK
    blocks = values[:whole].view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=absmax[: whole // BLOCK])
    scaled = torch.empty(size + size % 2, dtype=torch.float32, device=values.device)
    reciprocal = 1.0 / absmax[: whole // BLOCK].clamp(min=SMALLEST_ABSMAX)
    torch.mul(blocks, reciprocal[:, None], out=scaled[:whole].view(-1, BLOCK))
    if whole < size:
        tail = values[whole:]
        absmax[-1] = tail.abs().amax().clamp(min=SMALLEST_ABSMAX)
        scaled[whole:size] = tail / absmax[-1]
        scaled[size:] = 0.0
    indices = torch.bucketize(scaled.clamp_(-1.0, 1.0), _midpoints(values.device), out_int32=True).to(torch.uint8)
    torch.bitwise_or(indices[::2] << 4, indices[1::2], out=codes)


@torch.no_grad()
def quantize(
    weight: Float[torch.Tensor, "out in"], *, nested: bool = False, offset: Float32[torch.Tensor, ""] | None = None
) -> NF4:
    """Quantize a weight ``[out, in]`` of any float dtype, on its device; see the contract for the format.

    Beyond the result it takes a few `SLICE`-sized temporaries (and a copy of a weight that is not contiguous).

    Args:
        offset: replaces the mean of the maxima in a nested quantization.

    Raises:
        ValueError: the weight is empty, or an offset is given without nested.
    """
    if weight.numel() == 0:
        raise ValueError(f"a weight to quantize must hold values, and this one has the shape {tuple(weight.shape)}")
    if offset is not None and not nested:
        raise ValueError("offset belongs to nested quantization: pass nested=True with it, or leave it out")
    flat = weight.detach().reshape(-1)
    size = flat.numel()
    codes = torch.empty(-(-size // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-size // BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, size, SLICE):
        stop = min(start + SLICE, size)
        _quantize_slice(
            flat[start:stop].float(),
            codes[start // 2 : -(-stop // 2)],
            absmax[start // BLOCK : -(-stop // BLOCK)],
        )
    shape = (weight.shape[0], weight.shape[1])
    if not nested:
        return NF4(codes=codes, absmax=absmax, nested=None, shape=shape)
    if offset is None:
        offset = absmax.mean()
    absmax_codes, outer = quantize_dynamic(absmax - offset)
    return NF4(codes, absmax_codes, Nested(absmax=outer, offset=offset, code=dynamic_code_on(flat.device)), shape)


def quantize_dynamic(
    values: Float32[torch.Tensor, " n"], signed: bool = True
) -> tuple[UInt8[torch.Tensor, " n"], Float32[torch.Tensor, " blocks"]]:
    """Values in 8 bits of the dynamic code, by blocks of 256, and the blocks' absolute maxima; as bitsandbytes on a CPU."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = padded.abs().amax(dim=1)
    # A block of zeros has no scale; its steps are never looked up.
    scaled = (padded * torch.where(absmax > 0, 1.0 / absmax, 0.0)[:, None]).clamp_(-1.0, 1.0)
    # The second clamp is for what is not a number: it must not become an index out of bounds.
    steps = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(torch.int32).clamp_(0, 65535)
    # index_select and 32-bit indices: on a CPU advanced indexing takes several times as long.
    codes = step_lookup_on(values.device, signed).index_select(0, steps.view(-1)).view_as(steps)
    codes.masked_fill_((absmax == 0)[:, None], 0)
    return codes.view(-1)[:count].contiguous(), absmax


def block_scales(quantized: NF4) -> Float32[torch.Tensor, " blocks"]:
    """The float32 absmax of every block, with the nested level undone.

    The product and the sum are rounded one after the other, as bitsandbytes does; they are two kernels here, so nothing
    contracts them.
    """
    if quantized.nested is None:
        return quantized.absmax
    nested = quantized.nested
    outer = nested.absmax.repeat_interleave(NESTED_BLOCK)[: quantized.absmax.numel()]
    return nested.code.index_select(0, quantized.absmax.int()) * outer + nested.offset


@torch.no_grad()
def dequantize(quantized: NF4, dtype: torch.dtype) -> Float[torch.Tensor, "out in"]:
    """The weight ``[out, in]`` of a quantized one, rounded once from float32 to `dtype`."""
    codes = quantized.codes.reshape(-1)
    scales = block_scales(quantized)
    size = quantized.shape[0] * quantized.shape[1]
    out = torch.empty(size, dtype=dtype, device=codes.device)
    for start in range(0, size, SLICE):
        stop = min(start + SLICE, size)
        values = _pairs(codes.device).index_select(0, codes[start // 2 : -(-stop // 2)].int()).view(-1)[: stop - start]
        whole = values.numel() - values.numel() % BLOCK
        first = start // BLOCK
        values[:whole].view(-1, BLOCK).mul_(scales[first : first + whole // BLOCK, None])
        if whole < values.numel():
            values[whole:] *= scales[-1]
        out[start:stop] = values
    return out.view(quantized.shape)


@torch.no_grad()
def matvec(
    x: Float[torch.Tensor, "rows in"], weights: Sequence[NF4], bias: Float[torch.Tensor, " out"] | None = None
) -> Float[torch.Tensor, "rows out"]:
    """``x·Wᵀ`` for weights that share their input, side by side; each weight is dequantized for the product."""
    products = [torch.nn.functional.linear(x, dequantize(weight, x.dtype)) for weight in weights]
    y = products[0] if len(products) == 1 else torch.cat(products, dim=1)
    return y if bias is None else y.add_(bias)
