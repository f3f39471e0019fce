"""Attention with its projections: from ops, written out for training, and for one token a row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.linear import GetArray, Linear, LinearGroup, Place, add_linears, pad_columns
from jaxsloth.jax_backend.norm import RMSNorm
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.run import Run
from jaxsloth.kernels.attention import jax_library_ops, pallas_cached, xla_cached
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.rope import pallas_kernel as rope_kernel
from jaxsloth.models import spec as specs

# What the written pair keeps by mode: the products with A and attention's output and statistics always.
_KEEPS_QKV = ("none", "selective", "offload")


class Attention(nnx.Module):
    """A body (see body.py). Its input and output are ``[batch, length, hidden]`` in `forward`, flat in the written pair."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    qkv_proj: Linear
    o_proj: Linear

    def __init__(self, spec: specs.Attention, place: Place, part: str, get: GetArray, ops: Ops) -> None:
        self.spec, self._ops, self._hidden = spec, ops, place.spec.hidden
        self._implementation = ops.attention(spec)
        add_linears(self, place, part, get, ops)
        if spec.qk_norm is not None:
            prefix = f"model.layers.{place.index}.{part}"
            self.q_norm = RMSNorm(spec.qk_norm, f"{prefix}.q_norm", get, ops)
            self.k_norm = RMSNorm(spec.qk_norm, f"{prefix}.k_norm", get, ops)

    def groups(self, stream_pad: int = 0) -> dict[str, LinearGroup]:
        """Queries, keys and values; o_proj, whose gradient is the stream's."""
        projections = ("qkv_proj",) if self.spec.fused_qkv else ("q_proj", "k_proj", "v_proj")
        return {"qkv": LinearGroup(self, projections), "out": LinearGroup(self, ("o_proj",), stream_pad)}

    @property
    def pad(self) -> int:
        return self.groups()["qkv"].pad

    @property
    def out_pad(self) -> int:
        return self.groups()["out"].pad

    def written_refusal(self) -> str | None:
        asked = self._ops.asked_otherwise("rope")
        return asked or next(filter(None, (group.written_refusal() for group in self.groups().values())), None)

    def kept_widths(self, mode: str) -> int:
        spec = self.spec
        q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        lows = sum(group.pad for group in self.groups().values())
        kept = lows + q_width + (q_width + 2 * kv_width if mode in _KEEPS_QKV else 0)
        return kept + (self._hidden + self.pad if mode == "none" else 0)

    def working_width(self) -> int:
        return 4 * (self.spec.heads + self.spec.kv_heads) * self.spec.head_dim

    # From ops.

    def forward(self, x: Any, run: Run, cache: Cache | None = None) -> tuple[Any, Cache | None]:
        """(y, the cache with this pass written)."""
        spec, (batch, length) = self.spec, x.shape[:2]
        q, k, v = (t.reshape(batch, length, -1, spec.head_dim) for t in self._project(x, run))
        q, k = self._turn(q, k, run)
        offset, kv_segments = 0, run.segments if run.kv_segments is None else run.kv_segments
        if cache is not None:
            cache = cache.append(k, v, run.used)
            k, v, offset, kv_segments = cache.keys, cache.values, run.used, run.kv_segments
        out = self._implementation.load()(
            q,
            k,
            v,
            scale=spec.scale,
            causal=spec.causal,
            window=spec.window,
            soft_cap=spec.soft_cap,
            q_segments=run.segments,
            kv_segments=kv_segments,
            q_offset=offset,
        )
        return self.o_proj.forward(out.reshape(batch, length, -1), run), cache

    def _project(self, x: Any, run: Run) -> tuple[Any, ...]:
        spec = self.spec
        if spec.fused_qkv:
            q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
            return tuple(jnp.split(self.qkv_proj.forward(x, run), [q_width, q_width + kv_width], axis=-1))
        return self.q_proj.forward(x, run), self.k_proj.forward(x, run), self.v_proj.forward(x, run)

    def _turn(self, q: Any, k: Any, run: Run) -> tuple[Any, Any]:
        """q and k ``[batch, length, heads, head_dim]``, normed and turned where the spec says so."""
        if self.spec.qk_norm is not None:
            q, k = self.q_norm.forward(q, run.layer), self.k_norm.forward(k, run.layer)
        if self.spec.rope is not None:
            cos, sin = run.tables_of(self.spec.rope)
            q, k = self._ops.rope(q, cos, sin), self._ops.rope(k, cos, sin)
        return q, k

    # Written.

    def forward_keeping(self, x: Any, run: Run, mode: str | None) -> tuple[Any, dict[str, Any]]:
        """(y ``[tokens, hidden]``, what is kept) from x, padded.

        Kept: the products with A and attention's output and statistics; q, k and v (before their norm, where there is one)
        unless mode is full; x where it is none.
        """
        groups, pair = self.groups(run.stream_pad), self._pair(run)
        qkv, xa_qkv, x = groups["qkv"].forward(x, run)
        q, k, v = pair.split(qkv)
        attended = pair.attend(q, k, v)
        rows = pad_columns(pair.rows_of(attended), groups["out"].pad)
        y, xa_out, _ = groups["out"].forward(rows, run)
        kept = {"attention": attended, "xa": (xa_qkv, xa_out)}
        if mode in _KEEPS_QKV:
            kept["qkv"] = qkv if self.spec.qk_norm is not None else (q, k, v)
        if mode == "none":
            kept["x"] = x
        return y, kept

    def backward(self, dy: Any, kept: dict[str, Any], run: Run, form_x: Any) -> tuple[Any, Any, dict[str, Any]]:
        groups, pair = self.groups(run.stream_pad), self._pair(run)
        xa_qkv, xa_out = kept["xa"]
        dattended, dy = groups["out"].backward_input(dy, run)
        gradients = groups["out"].backward_adapters(pair.rows_of(kept["attention"]), xa_out, dy, run)
        x = kept["x"] if "x" in kept else form_x()
        if "qkv" not in kept:
            qkv = groups["qkv"].forward(x, run, xa_qkv)[0]
        elif self.spec.qk_norm is not None:
            qkv = kept["qkv"]
        else:
            qkv = None
        q, k, v = kept["qkv"] if qkv is None else pair.split(qkv)
        dq, dk, dv = pair.attend_backward(q, k, v, kept["attention"], dattended.reshape(q.shape))
        dx, dqkv = groups["qkv"].backward_input(pair.merge(dq, dk, dv, qkv, groups["qkv"].pad), run)
        return dx, dy, groups["qkv"].backward_adapters(x, xa_qkv, dqkv, run) | gradients

    def _pair(self, run: Run) -> _Between:
        spec, dtype = self.spec, jnp.dtype(self._ops.dtype)
        library = not self._ops.asked_for("attention")
        refused = jax_library_ops.refuses(platform(), dtype, spec.head_dim, spec.causal, spec.soft_cap)
        kernel = self._implementation.load()
        settings = jax_library_ops.AttentionSettings(
            spec.scale, spec.causal, spec.window, spec.soft_cap, run.unpacked, library and refused is None, kernel
        )
        return _Between(self, run, settings)

    # Few rows.

    def step(self, x: Any, cache: Cache | None, run: Run, packed: Any) -> tuple[Any, Cache | None]:
        assert cache is not None
        spec, rows, groups = self.spec, x.shape[0], self.groups()
        width = spec.heads * spec.head_dim
        projected = groups["qkv"].step(x, packed["qkv"], run)
        q, k, v = jnp.split(projected, [width, width + spec.kv_heads * spec.head_dim], axis=-1)
        if spec.qk_norm is not None:
            q, k = (
                norm.forward(t.reshape(rows, -1, spec.head_dim), run.layer).reshape(rows, -1)
                for norm, t in ((self.q_norm, q), (self.k_norm, k))
            )
        module = _cached(cache)
        q, keys, values = module.append(q, k, v, run.tables_of(spec.rope), cache.keys, cache.values, run.used)
        out = module.attend(
            q, keys, values, run.segments, run.used, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap
        )
        return groups["out"].step(out, packed["out"], run), Cache(keys, values)


@dataclass(frozen=True)
class _Between:
    """What lies between the two products of the written pair: heads, turning, attention."""

    body: Attention
    run: Run
    settings: jax_library_ops.AttentionSettings

    @property
    def _heads(self) -> rope_kernel.Heads:
        spec = self.body.spec
        norm = None if spec.qk_norm is None else rope_kernel.HeadNorm(spec.qk_norm.eps, spec.qk_norm.weight_offset)
        return rope_kernel.Heads(spec.heads, spec.kv_heads, spec.head_dim, platform() != "cuda", norm)

    @property
    def _norm_weights(self) -> tuple[Any, ...]:
        body = self.body
        return () if body.spec.qk_norm is None else (body.q_norm.own(self.run.layer), body.k_norm.own(self.run.layer))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*self.run.segments.shape, -1, self.body.spec.head_dim)

    def _flat_tables(self) -> list[Any] | None:
        """(cos, sin) by token where the kernel can turn the heads; None where ops do it."""
        spec, tables = self.body.spec, self.run.tables_of(self.body.spec.rope)
        if tables is None or rope_kernel.refuses(spec.head_dim, tables[0].shape[-1]) is not None:
            return None
        if spec.qk_norm is not None and self.body.q_norm.written_refusal() is not None:
            return None
        return [table.reshape(self.run.segments.size, -1) for table in tables]

    def _cut(self, qkv: Any) -> tuple[Any, ...]:
        return tuple(qkv[:, start:end].reshape(self._shape) for start, end in pairwise((0, *accumulate(self._heads.widths))))

    def split(self, qkv: Any) -> tuple[Any, Any, Any]:
        """q and k, normed and turned, and v, ``[batch, length, heads, head_dim]``, of the merged projection."""
        tables = self._flat_tables()
        if tables is not None:
            q, k, v = rope_kernel.split(self._heads, qkv, *tables, weights=self._norm_weights)
            return q.reshape(self._shape), k.reshape(self._shape), v.reshape(self._shape)
        q, k, v = self._cut(qkv)
        return *self.body._turn(q, k, self.run), v

    def merge(self, dq: Any, dk: Any, dv: Any, qkv: Any, pad: int) -> Any:
        """The gradient of the merged projection, padded; qkv: itself, where q and k have a norm."""
        tables, tokens = self._flat_tables(), dq.shape[0] * dq.shape[1]
        if tables is not None:
            flat = (d.reshape(tokens, -1) for d in (dq, dk, dv))
            return rope_kernel.merge(self._heads, pad, *flat, *tables, merged=qkv, weights=self._norm_weights)
        if self.body.spec.qk_norm is not None:
            q, k, _ = self._cut(qkv)
            dq, dk = jax.vjp(lambda q, k: self.body._turn(q, k, self.run), q, k)[1]((dq, dk))
        elif self.body.spec.rope is not None:
            cos, sin = self.run.tables_of(self.body.spec.rope)
            dq, dk = self.body._ops.rope(dq, cos, -sin), self.body._ops.rope(dk, cos, -sin)
        parts = [part.reshape(tokens, -1) for part in (dq, dk, dv)]
        return jnp.concatenate([*parts, jnp.zeros((tokens, pad), dq.dtype)], axis=1)

    def attend(self, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        """What `attend_backward` needs beside q, k and v; `rows_of` makes the output of it."""
        return jax_library_ops.forward(q, k, v, self.settings, self.run.segments, self.run.documents)

    def attend_backward(self, q: Any, k: Any, v: Any, kept: Any, dout: Any) -> tuple[Any, Any, Any]:
        return jax_library_ops.backward(q, k, v, kept, dout, self.settings, self.run.segments, self.run.documents)

    def rows_of(self, kept: Any) -> Any:
        """Attention's output ``[tokens, heads·head_dim]``."""
        spec, (batch, length) = self.body.spec, self.run.segments.shape
        out = jax_library_ops.attended(kept, (batch, length, spec.heads, spec.head_dim), self.settings, self.run.documents)
        return out.reshape(batch * length, -1)


def _cached(cache: Cache) -> ModuleType:
    refused = pallas_cached.refuses(cache.keys.size, cache.keys.shape[-1])
    return pallas_cached if platform() == "cuda" and refused is None else xla_cached
