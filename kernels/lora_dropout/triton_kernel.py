"""LoRA's A behind a dropout as Triton kernels (triton_parts.py) that draw the masks in registers.

x is never written masked, and the scale of kept elements is applied to sums. `project` and `gradient_a` cut their sums in a
number of parts that the shapes fix, and add those in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Float32
from triton import knobs

from jaxsloth.kernels.dropout.contract import kept_scale, share_of, threshold
from jaxsloth.kernels.lora_dropout import torch_ops
from jaxsloth.kernels.lora_dropout import triton_parts as kernels
from jaxsloth.kernels.lora_dropout.contract import Masks

INTERPRETED = knobs.runtime.interpret  # which runs no PTX


class Tiles(NamedTuple):
    """Tokens and counters that a program handles at once, the most columns of a module, warps, stages of loads, and the
    programs that a launch should at least have."""

    tokens: int
    counters: int
    ranks: int
    warps: int = 4
    stages: int = 1
    programs: int = 792


PROJECT, INPUT, GRADIENT = Tiles(64, 32, 128), Tiles(64, 16, 64), Tiles(64, 32, 32)

ADD = {"num_warps": 4}


class Run(NamedTuple):
    """Neighbouring modules of one rank, and the columns that are theirs."""

    module: int
    count: int
    column: int
    rank: int
    tile: int  # columns that a program handles
    blocks: int  # of them a module has


def _runs(masks: Masks, most: int) -> Iterator[Run]:
    for module, count, column, rank in masks.runs():
        tile = max(16, min(triton.next_power_of_2(rank), most))
        yield Run(module, count, column, rank, tile, triton.cdiv(rank, tile))


def _cut(steps: int, programs: int, tiles: Tiles) -> tuple[int, int]:
    """(parts of a sum of so many steps, steps of each), so that there are programs enough."""
    each = triton.cdiv(steps, min(steps, triton.cdiv(tiles.programs, programs)))
    return triton.cdiv(steps, each), each


def _drawn(masks: Masks, run: Run, tokens: int, channels: int) -> dict[str, Any]:
    """The arguments that masks are drawn from, and the run's rank."""
    return {
        "key": masks.key,
        "modules": masks.modules[run.module :],
        "rows": masks.rows,
        "tokens": tokens,
        "length": masks.length,
        "first": masks.first,
        "channels": channels,
        "share": share_of(channels),
        "ranks": run.rank,
        "BAR": threshold(masks.rate),
        "PTX": not INTERPRETED,
    }


def _tiled(tiles: Tiles, run: Run) -> dict[str, int]:
    sizes = {"BLOCKS": run.blocks, "TOKENS": tiles.tokens, "COUNTERS": tiles.counters, "RANKS": run.tile}
    return {**sizes, "num_warps": tiles.warps, "num_stages": tiles.stages}


@torch.no_grad()
def project(
    x: Float[torch.Tensor, "tokens wide"],
    a_packed: Float[torch.Tensor, "pad in"],
    masks: Masks,
    *,
    out: Float[torch.Tensor, "tokens pad"] | None = None,
    tiles: Tiles | None = None,
) -> Float[torch.Tensor, "tokens pad"]:
    """See the contract."""
    tiles = tiles or PROJECT
    tokens, (pad, channels) = x.shape[0], a_packed.shape
    out = x.new_empty(tokens, pad) if out is None else out
    if tokens == 0:
        return out
    runs, across = list(_runs(masks, tiles.ranks)), triton.cdiv(tokens, tiles.tokens)
    steps = triton.cdiv(share_of(channels), tiles.counters)
    parts, each = _cut(steps, sum(run.count * run.blocks for run in runs) * across, tiles)
    found = torch.empty(parts, tokens, masks.rank, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        for run in runs:
            kernels.project_kernel[(run.count * run.blocks, across, parts)](
                x=x,
                a=a_packed[run.column :],
                parts=found[..., run.column :],
                columns=masks.rank,
                x_stride=x.stride(0),
                a_stride=a_packed.stride(0),
                steps=each,
                **_drawn(masks, run, tokens, channels),
                **_tiled(tiles, run),
            )
        width = min(triton.next_power_of_2(pad), 64)
        kernels.finish_projection_kernel[(triton.cdiv(tokens, 32), triton.cdiv(pad, width))](
            found, out, tokens, masks.rank, pad, out.stride(0), kept_scale(masks.rate), PARTS=parts, ROWS=32, WIDTH=width
        )
    return out


@torch.no_grad()
def input_gradient(
    dx: Float[torch.Tensor, "tokens in"],
    g: Float[torch.Tensor, "tokens pad"],
    a_packed: Float[torch.Tensor, "pad in"],
    masks: Masks,
    *,
    tiles: Tiles | None = None,
) -> Float[torch.Tensor, "tokens in"]:
    """See the contract."""
    tiles = tiles or INPUT
    tokens, channels = dx.shape
    if tokens == 0:
        return dx
    grid = triton.cdiv(share_of(channels), tiles.counters), triton.cdiv(tokens, tiles.tokens)
    with torch.cuda.device_of(dx):
        for run in _runs(masks, tiles.ranks):
            kernels.input_kernel[grid](
                dx=dx,
                g=g[:, run.column :],
                a=a_packed[run.column :],
                dx_stride=dx.stride(0),
                g_stride=g.stride(0),
                a_stride=a_packed.stride(0),
                scale=kept_scale(masks.rate),
                count=run.count,
                **_drawn(masks, run, tokens, channels),
                **_tiled(tiles, run),
            )
    return dx


@torch.no_grad()
def gradient_a(
    g: Float[torch.Tensor, "tokens pad"],
    x: Float[torch.Tensor, "tokens wide"],
    masks: Masks,
    totals: Sequence[Float32[torch.Tensor, "_ in"]],
    *,
    tiles: Tiles | None = None,
) -> None:
    """See the contract."""
    tiles = tiles or GRADIENT
    tokens, channels = x.shape[0], totals[0].shape[1]
    if tokens == 0:
        return
    runs, across = list(_runs(masks, tiles.ranks)), triton.cdiv(share_of(channels), tiles.counters)
    parts, each = _cut(triton.cdiv(tokens, tiles.tokens), sum(run.count * run.blocks for run in runs) * across, tiles)
    found = torch.empty(parts, masks.rank, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        for run in runs:
            kernels.gradient_kernel[(run.count * run.blocks, across, parts)](
                g=g[:, run.column :],
                x=x,
                parts=found[:, run.column :],
                columns=masks.rank,
                g_stride=g.stride(0),
                x_stride=x.stride(0),
                steps=each,
                scale=kept_scale(masks.rate),
                **_drawn(masks, run, tokens, channels),
                **_tiled(tiles, run),
            )
        _add_parts(found, masks, totals)


def _add_parts(
    parts: Float32[torch.Tensor, "parts rank in"], masks: Masks, totals: Sequence[Float32[torch.Tensor, "_ in"]]
) -> None:
    """Adds the sum of the parts to each module's gradient, at once for those that lie one behind the other."""
    place = 0
    while place < len(totals):
        first, size, column = totals[place], 0, masks.places[place].start
        while place < len(totals) and totals[place].data_ptr() == first.data_ptr() + 4 * size:
            size, place = size + totals[place].numel(), place + 1
        kernels.add_parts_kernel[(triton.cdiv(size, 1024),)](
            parts[:, column:], first, size, parts.stride(0), PARTS=parts.shape[0], SIZE=1024, **ADD
        )


class _Products:
    project, input_gradient, gradient_a = project, input_gradient, gradient_a


def lora_dropout(
    x: Float[torch.Tensor, "tokens in"], a: Float32[torch.Tensor, "rank in"], masks: Masks
) -> Float[torch.Tensor, "tokens rank"]:
    """See the contract."""
    return torch_ops.differentiable(x, a, masks, _Products)
