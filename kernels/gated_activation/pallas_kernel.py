"""Gated activation of a merged projection as Pallas kernels (lowered through Triton): one pass each way over wide arrays.

Forward ``h = act(gate)·up`` from ``[gate, up]``; backward ``[dh·up·act'(gate), dh·act(gate)]``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsloth.kernels.gated_activation.xla_ops import activate, slope

SIZE = 1024


def _forward_kernel(merged: Any, h: Any, *, width: int, kind: str) -> None:
    row, column = pl.program_id(0), pl.program_id(1) * SIZE + jnp.arange(SIZE, dtype=jnp.int32)
    inside = column < width
    gate = plgpu.load(merged.at[row, column], mask=inside, other=0.0)
    up = plgpu.load(merged.at[row, column + width], mask=inside, other=0.0)
    act = activate(gate.astype(jnp.float32), kind).astype(gate.dtype).astype(jnp.float32)
    plgpu.store(h.at[row, column], (act * up.astype(jnp.float32)).astype(h.dtype), mask=inside)


def _backward_kernel(merged: Any, dh: Any, dmerged: Any, *, width: int, kind: str) -> None:
    row, column = pl.program_id(0), pl.program_id(1) * SIZE + jnp.arange(SIZE, dtype=jnp.int32)
    inside = column < width
    gate = plgpu.load(merged.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
    up = plgpu.load(merged.at[row, column + width], mask=inside, other=0.0).astype(jnp.float32)
    d = plgpu.load(dh.at[row, column], mask=inside, other=0.0).astype(jnp.float32)
    plgpu.store(dmerged.at[row, column], (d * up * slope(gate, kind)).astype(dmerged.dtype), mask=inside)
    plgpu.store(dmerged.at[row, column + width], (d * activate(gate, kind)).astype(dmerged.dtype), mask=inside)


def _call(kernel: Any, shape: tuple[int, int], dtype: Any, width: int, interpret: bool, name: str) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(shape[0], pl.cdiv(width, SIZE)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def gated_merged(merged: Any, width: int, kind: str, room: int, interpret: bool) -> Any:
    """h ``[rows, width + room]``, wide, from ``[gate, up]`` ``[rows, 2·width + any]``, wide; kind is one of the contract's."""
    kernel = partial(_forward_kernel, width=width, kind=kind)
    shape = (merged.shape[0], width + room)
    return _call(kernel, shape, merged.dtype, width, interpret, "gated_activation")(merged)


def _forward(merged: Any, width: int, kind: str, room: int, interpret: bool) -> tuple[Any, Any]:
    return gated_merged(merged, width, kind, room, interpret), merged


def _backward(width: int, kind: str, room: int, interpret: bool, merged: Any, dh: Any) -> tuple[Any]:
    del room
    kernel = partial(_backward_kernel, width=width, kind=kind)
    call = _call(kernel, merged.shape, merged.dtype, width, interpret, "gated_activation_backward")
    return (call(merged, dh),)


gated_merged.defvjp(_forward, _backward)
