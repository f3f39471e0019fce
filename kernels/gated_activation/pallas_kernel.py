"""Gated activation of a merged projection as Pallas kernels (lowered through Triton): one pass each way over wide arrays.

Forward ``h = act(gate)·up`` from ``[gate, up]``; backward ``[dh·up·act'(gate), dh·act(gate)]``, and h once more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsloth.kernels.gated_activation.xla_ops import activate, derivative

SIZE = 1024
PARAMETERS = plgpu.CompilerParams(num_warps=4, num_stages=1)


def _forward_kernel(merged: Any, h: Any, *, width: int, kind: str) -> None:
    row, column = pl.program_id(0), pl.program_id(1) * SIZE + jnp.arange(SIZE, dtype=jnp.int32)
    inside = column < width
    gate = plgpu.load(merged.at[row, column], mask=inside, other=0.0)
    up = plgpu.load(merged.at[row, column + width], mask=inside, other=0.0)
    act = activate(gate.astype(jnp.float32), kind).astype(gate.dtype).astype(jnp.float32)
    plgpu.store(h.at[row, column], (act * up.astype(jnp.float32)).astype(h.dtype), mask=inside)


def _backward_kernel(merged: Any, dh: Any, dmerged: Any, h: Any, *, width: int, kind: str) -> None:
    row, column = pl.program_id(0), pl.program_id(1) * SIZE + jnp.arange(SIZE, dtype=jnp.int32)
    inside = column < width
    gate = plgpu.load(merged.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
    up = plgpu.load(merged.at[row, column + width], mask=inside, other=0.0).astype(jnp.float32)
    d = plgpu.load(dh.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
    act = activate(gate, kind)
    plgpu.store(dmerged.at[row, column], (d * up * derivative(gate, kind)).astype(dmerged.dtype), mask=inside)
    plgpu.store(dmerged.at[row, column + width], (d * act).astype(dmerged.dtype), mask=inside)
    plgpu.store(h.at[row, column], (act.astype(h.dtype).astype(jnp.float32) * up).astype(h.dtype), mask=inside)


def activate_merged(merged: Any, width: int, kind: str, pad: int, *, interpret: bool = False) -> Any:
    """h ``[rows, width + pad]``, padded, from ``[gate, up]`` ``[rows, 2·width]``; kind is one of the contract's."""
    call = pl.pallas_call(
        partial(_forward_kernel, width=width, kind=kind),
        out_shape=jax.ShapeDtypeStruct((merged.shape[0], width + pad), merged.dtype),
        grid=(merged.shape[0], pl.cdiv(width, SIZE)),
        compiler_params=PARAMETERS,
        interpret=interpret,
        name="gated_activation",
    )
    return call(merged)


def activate_merged_backward(merged: Any, dh: Any, kind: str, pad: int, *, interpret: bool = False) -> tuple[Any, Any]:
    """(the gradient of merged ``[rows, 2·width + pad]``, padded; h ``[rows, width]`` in dh's memory)."""
    rows, width = dh.shape
    call = pl.pallas_call(
        partial(_backward_kernel, width=width, kind=kind),
        out_shape=(jax.ShapeDtypeStruct((rows, 2 * width + pad), dh.dtype), jax.ShapeDtypeStruct(dh.shape, dh.dtype)),
        grid=(rows, pl.cdiv(width, SIZE)),
        input_output_aliases={1: 1},
        compiler_params=PARAMETERS,
        interpret=interpret,
        name="gated_activation_backward",
    )
    return call(merged, dh)
