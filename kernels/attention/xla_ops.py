"""Attention in plain JAX: scores whole, softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsloth.kernels.jax_platform import precision_of

# Finite, so that a row that sees nothing stays finite too; its probabilities are then set to zero.
_HIDDEN = -1e30


def visible(
    q_length: int,
    kv_length: int,
    *,
    causal: bool,
    window: int | None,
    q_segments: Int[Array, "batch q_length"] | None,
    kv_segments: Int[Array, "batch kv_length"] | None,
    q_offset: int | Int[Array, ""],
) -> Bool[Array, "rows q_length kv_length"]:
    """Which keys each query sees; rows is the batch, or 1 without segments."""
    slot = jnp.arange(q_length, dtype=jnp.int32)[:, None] + q_offset
    key = jnp.arange(kv_length, dtype=jnp.int32)[None, :]
    seen = jnp.ones((q_length, kv_length), bool)
    if causal:
        seen &= key <= slot
    if window is not None:
        seen &= slot - key < window
        if not causal:
            seen &= key - slot < window
    if q_segments is None:
        return seen[None]
    others = q_segments if kv_segments is None else kv_segments
    mine = q_segments[:, :, None]
    return seen[None] & (mine == others[:, None, :]) & (mine != 0)


def check_arguments(q: Array, k: Array, q_segments: Array | None, kv_segments: Array | None) -> None:
    """Refuses what no implementation of `attention` can read; see there."""
    q_length, heads = q.shape[1:3]
    kv_length, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    if q_segments is None and kv_segments is not None:
        raise ValueError("kv_segments came without q_segments: pass the queries' segments too")
    if q_segments is not None and kv_segments is None and q_length != kv_length:
        raise ValueError(f"q_segments [{q_length}] can't stand for {kv_length} keys: pass kv_segments")


def attention(
    q: Float[Array, "batch q_length heads head_dim"],
    k: Float[Array, "batch kv_length kv_heads head_dim"],
    v: Float[Array, "batch kv_length kv_heads head_dim"],
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    q_segments: Int[Array, "batch q_length"] | None = None,
    kv_segments: Int[Array, "batch kv_length"] | None = None,
    q_offset: int | Int[Array, ""] = 0,
) -> Float[Array, "batch q_length heads head_dim"]:
    """As the contract says; keeps what autodiff keeps, the probabilities among it.

    Raises:
        ValueError: heads is no multiple of kv_heads, segments are given for the keys only, or q_segments has to serve for
            keys of another length.
    """
    check_arguments(q, k, q_segments, kv_segments)
    batch, q_length, heads, head_dim = q.shape
    kv_length, kv_heads = k.shape[1:3]
    grouped = q.reshape(batch, q_length, kv_heads, heads // kv_heads, head_dim)
    precision = precision_of(q.dtype)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, precision=precision, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = visible(
        q_length,
        kv_length,
        causal=causal,
        window=window,
        q_segments=q_segments,
        kv_segments=kv_segments,
        q_offset=q_offset,
    )[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(seen, scores, _HIDDEN), axis=-1)
    probabilities = jnp.where(seen, probabilities, 0.0).astype(v.dtype)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", probabilities, v, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, q_length, heads, head_dim)
