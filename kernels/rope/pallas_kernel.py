"""What lies between the merged projection and attention as Pallas kernels (lowered through Triton): RMSNorm of every head of
queries and keys, where the model has one, and their rotary embedding.

Forward, a token a program: its heads are read from the merged row, those of q and k normed and turned, and written to three
arrays of their own; with c = cos and s = sin: ``(a, b) -> (a·c - b·s, b·c + a·s)`` for channels i and i + half. Backward: the
three gradients are read, turned by the opposite angle, taken through the norm, whose input is the merged row, and written side
by side. With ``n = x·rstd`` and ``g = dy·(offset + w)``: ``dx = rstd·(g - n·mean(g·n))``; the weights w are frozen.
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
class HeadNorm:
    """RMSNorm of every head of q and k; offset is added to the weight."""

    eps: float
    offset: float


@dataclass(frozen=True)
class Heads:
    """The layout of a merged row: `q` heads, `kv` heads of keys, `kv` of values, each of `dim` channels, then anything."""

    q: int
    kv: int
    dim: int
    interpret: bool = False
    norm: HeadNorm | None = None

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


Halves = tuple[Any, Any]  # a token's heads ``[heads up to a power of two, dim / 2]``: their first and second channels


def _places(start: int, heads: int, dim: int) -> tuple[Any, Any]:
    """(columns of the heads' first halves, where there is a head), beginning at column `start`."""
    head, half = jnp.arange(pl.next_power_of_2(heads), dtype=jnp.int32)[:, None], dim // 2
    channel = jnp.arange(half, dtype=jnp.int32)[None, :]
    return start + head * dim + channel, jnp.broadcast_to(head < heads, (head.shape[0], half))


def _load(source: Any, start: int, heads: int, dim: int) -> Halves:
    place, inside = _places(start, heads, dim)
    token, read = pl.program_id(0), jnp.where(inside, place, start)  # the interpreter reads what the mask hides too
    first, second = (plgpu.load(source.at[token, read + more], mask=inside, other=0.0) for more in (0, dim // 2))
    return first, second


def _store(target: Any, start: int, heads: int, dim: int, values: Halves) -> None:
    place, inside = _places(start, heads, dim)
    for more, value in zip((0, dim // 2), values, strict=True):
        plgpu.store(target.at[pl.program_id(0), place + more], value.astype(target.dtype), mask=inside)


def _wide(values: Halves) -> Halves:
    return values[0].astype(jnp.float32), values[1].astype(jnp.float32)


def _turned(values: Halves, angles: Any) -> Halves:
    (a, b), (c, s), dtype = _wide(values), angles, values[0].dtype
    return (a * c - b * s).astype(dtype), (b * c + a * s).astype(dtype)


def _scale(weight: Any, dim: int) -> Halves:
    channel = jnp.arange(dim // 2, dtype=jnp.int32)
    return _wide((weight[channel][None, :], weight[dim // 2 + channel][None, :]))


def _normalised(values: Halves, eps: float, dim: int) -> tuple[Any, Halves]:
    """(the heads' reciprocals, the heads times them), float32."""
    a, b = _wide(values)
    rstd = jax.lax.rsqrt((jnp.sum(a * a, axis=1) + jnp.sum(b * b, axis=1)) / dim + eps)[:, None]
    return rstd, (a * rstd, b * rstd)


def _normed(values: Halves, weight: Any, heads: Heads) -> Halves:
    assert heads.norm is not None
    (_, halves), offset, dtype = _normalised(values, heads.norm.eps, heads.dim), heads.norm.offset, values[0].dtype
    if offset == 0.0:  # Llama rounds before it multiplies by the weight
        halves = _wide((halves[0].astype(dtype), halves[1].astype(dtype)))
    first, second = (n * (offset + w) for n, w in zip(halves, _scale(weight, heads.dim), strict=True))
    return first.astype(dtype), second.astype(dtype)


def _norm_backward(slopes: Halves, values: Halves, weight: Any, heads: Heads) -> Halves:
    assert heads.norm is not None
    rstd, (n, m) = _normalised(values, heads.norm.eps, heads.dim)
    g, h = (dy * (heads.norm.offset + w) for dy, w in zip(_wide(slopes), _scale(weight, heads.dim), strict=True))
    mean = ((jnp.sum(g * n, axis=1) + jnp.sum(h * m, axis=1)) / heads.dim)[:, None]
    return rstd * (g - n * mean), rstd * (h - m * mean)


def _split_kernel(merged: Any, cos: Any, sin: Any, *rest: Any, heads: Heads) -> None:
    """rest: the norms' weights, where there are norms, then q, k and v."""
    *weights, q, k, v = rest
    angles, start, dim = _angles(cos, sin, merged.dtype, heads.dim // 2, False), 0, heads.dim
    for place, (target, count) in enumerate(((q, heads.q), (k, heads.kv), (v, heads.kv))):
        values = _load(merged, start, count, dim)
        if place < 2:
            values = _turned(_normed(values, weights[place], heads) if weights else values, angles)
        _store(target, 0, count, dim, values)
        start += count * dim


def _merge_kernel(dq: Any, dk: Any, dv: Any, cos: Any, sin: Any, *rest: Any, heads: Heads) -> None:
    """rest: the merged row and the norms' weights, where there are norms, then its gradient."""
    *normed, dmerged = rest
    angles, start, dim = _angles(cos, sin, dq.dtype, heads.dim // 2, True), 0, heads.dim
    for place, (source, count) in enumerate(((dq, heads.q), (dk, heads.kv), (dv, heads.kv))):
        slopes = _load(source, 0, count, dim)
        if place < 2:
            slopes = _turned(slopes, angles)
            if normed:
                slopes = _norm_backward(slopes, _load(normed[0], start, count, dim), normed[1 + place], heads)
        _store(dmerged, start, count, dim, slopes)
        start += count * dim


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


def split(heads: Heads, merged: Any, cos: Any, sin: Any, weights: tuple[Any, ...] = ()) -> tuple[Any, Any, Any]:
    """q ``[tokens, q·dim]`` and k ``[tokens, kv·dim]``, normed and turned, and v ``[tokens, kv·dim]`` of a merged projection.

    merged ``[tokens, (q + 2·kv)·dim or more]``; cos and sin float32 ``[tokens, dim / 2]``; weights: with `heads.norm` those of
    q and k, ``[dim]`` each. `refuses` must have said None.
    """
    outs = tuple(jax.ShapeDtypeStruct((merged.shape[0], width), merged.dtype) for width in heads.widths)
    return _call(_split_kernel, heads, merged.shape[0], outs, "rope_split", merged, cos, sin, *weights)


def merge(
    heads: Heads, pad: int, dq: Any, dk: Any, dv: Any, cos: Any, sin: Any, merged: Any = None, weights: tuple[Any, ...] = ()
) -> Any:
    """The gradient of the merged projection, ``[tokens, (q + 2·kv)·dim + pad]``, from those of what `split` gave; the last
    `pad` columns hold nothing. merged and weights: with `heads.norm`, as `split` took them."""
    out = jax.ShapeDtypeStruct((dq.shape[0], sum(heads.widths) + pad), dq.dtype)
    normed = () if heads.norm is None else (merged, *weights)
    return _call(_merge_kernel, heads, dq.shape[0], out, "rope_merge", dq, dk, dv, cos, sin, *normed)
