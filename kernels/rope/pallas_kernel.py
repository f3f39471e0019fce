"""Rotary embedding of the merged projection of queries, keys and values as Pallas kernels (lowered through Triton).

Forward, a token a program: its heads are read from the merged row, those of q and k turned, and written to three arrays of
their own; with c = cos and s = sin: ``(a, b) -> (a·c - b·s, b·c + a·s)`` for channels i and i + half. Backward: the three
gradients are read, turned by the opposite angle, and written side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclass(frozen=True)
class Heads:
    """The layout of a merged row: `q` heads, `kv` heads of keys, `kv` of values, each of `dim` channels, then anything."""

    q: int
    kv: int
    dim: int
    interpret: bool = False

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.q * self.dim, self.kv * self.dim, self.kv * self.dim


def refuses(dim: int, half: int) -> str | None:
    """Why the kernels can't turn ``2·half`` channels of heads of `dim`, or None."""
    if 2 * half != dim:
        return f"turns whole heads, and of {dim} channels {2 * half} are to be turned"
    return None if half & (half - 1) == 0 else f"needs heads of a power of two channels, and they have {dim}"


def _angles(cos: Any, sin: Any, dtype: Any, half: int, opposite: bool) -> tuple[Any, Any]:
    """A token's tables ``[1, half]``, rounded to the data's dtype as transformers does."""
    token, channel = pl.program_id(0), jnp.arange(half, dtype=jnp.int32)
    c, s = (table[token, channel].astype(dtype).astype(jnp.float32)[None, :] for table in (cos, sin))
    return c, -s if opposite else s


def _move(source: Any, start: int, target: Any, offset: int, heads: int, dim: int, angles: Any) -> None:
    """One token's heads from column `start` of a row to column `offset` of another, turned where there are angles."""
    token, count = pl.program_id(0), pl.next_power_of_2(heads)
    head, half = jnp.arange(count, dtype=jnp.int32)[:, None], dim // 2
    channel = jnp.arange(half, dtype=jnp.int32)[None, :]
    inside = jnp.broadcast_to(head < heads, (count, half))
    place = head * dim + channel
    # The interpreter reads what the mask hides too.
    read = jnp.where(inside, place, 0)
    first = plgpu.load(source.at[token, start + read], mask=inside, other=0.0)
    second = plgpu.load(source.at[token, start + half + read], mask=inside, other=0.0)
    if angles is not None:
        c, s = angles
        a, b = first.astype(jnp.float32), second.astype(jnp.float32)
        first, second = (a * c - b * s).astype(target.dtype), (b * c + a * s).astype(target.dtype)
    plgpu.store(target.at[token, offset + place], first, mask=inside)
    plgpu.store(target.at[token, offset + half + place], second, mask=inside)


def _split_kernel(merged: Any, cos: Any, sin: Any, q: Any, k: Any, v: Any, *, heads: Heads) -> None:
    angles = _angles(cos, sin, merged.dtype, heads.dim // 2, False)
    q_width, kv_width, _ = heads.widths
    _move(merged, 0, q, 0, heads.q, heads.dim, angles)
    _move(merged, q_width, k, 0, heads.kv, heads.dim, angles)
    _move(merged, q_width + kv_width, v, 0, heads.kv, heads.dim, None)


def _merge_kernel(dq: Any, dk: Any, dv: Any, cos: Any, sin: Any, dmerged: Any, *, heads: Heads) -> None:
    angles = _angles(cos, sin, dq.dtype, heads.dim // 2, True)
    q_width, kv_width, _ = heads.widths
    _move(dq, 0, dmerged, 0, heads.q, heads.dim, angles)
    _move(dk, 0, dmerged, q_width, heads.kv, heads.dim, angles)
    _move(dv, 0, dmerged, q_width + kv_width, heads.kv, heads.dim, None)


def _call(kernel: Any, heads: Heads, tokens: int, outs: Any, name: str, *arrays: Any) -> Any:
    call = pl.pallas_call(
        partial(kernel, heads=heads),
        out_shape=outs,
        grid=(tokens,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=heads.interpret,
        name=name,
    )
    return call(*arrays)


def split(heads: Heads, merged: Any, cos: Any, sin: Any) -> tuple[Any, Any, Any]:
    """q ``[tokens, q·dim]`` and k ``[tokens, kv·dim]``, turned, and v ``[tokens, kv·dim]`` of a merged projection.

    merged ``[tokens, (q + 2·kv)·dim or more]``; cos and sin float32 ``[tokens, dim / 2]``. `refuses` must have said None.
    """
    outs = tuple(jax.ShapeDtypeStruct((merged.shape[0], width), merged.dtype) for width in heads.widths)
    return _call(_split_kernel, heads, merged.shape[0], outs, "rope_split", merged, cos, sin)


def merge(heads: Heads, room: int, dq: Any, dk: Any, dv: Any, cos: Any, sin: Any) -> Any:
    """The gradient of the merged projection, ``[tokens, (q + 2·kv)·dim + room]``, from those of what `split` gave; the last
    `room` columns hold nothing."""
    out = jax.ShapeDtypeStruct((dq.shape[0], sum(heads.widths) + room), dq.dtype)
    return _call(_merge_kernel, heads, dq.shape[0], out, "rope_merge", dq, dk, dv, cos, sin)
