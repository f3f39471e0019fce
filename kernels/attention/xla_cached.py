"""One token a row against stacked KV caches, in plain JAX; see the contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxsloth.kernels.attention.xla_ops import attention
from jaxsloth.kernels.rope.xla_ops import rope

Tables = tuple[Float32[Array, "rows *one half"], Float32[Array, "rows *one half"]]


def append(
    q: Float[Array, "rows all_heads"],
    k: Float[Array, "rows own_heads"],
    v: Float[Array, "rows own_heads"],
    tables: Tables | None,
    keys: Float[Array, "layers rows capacity kv_heads head_dim"],
    values: Float[Array, "layers rows capacity kv_heads head_dim"],
    slot: Int32[Array, ""],
    layer: Int32[Array, ""],
) -> tuple[Array, Array, Array]:
    """(q turned, the caches with this token's turned k, and v, at ``[layer, :, slot]``).

    Raises:
        ValueError: the tables turn more channels than a head has.
    """
    rows, head_dim = q.shape[0], keys.shape[4]
    if tables is not None:
        cos, sin = (table.reshape(rows, 1, table.shape[-1]) for table in tables)
        q, k = (rope(t.reshape(rows, 1, t.shape[1] // head_dim, head_dim), cos, sin).reshape(t.shape) for t in (q, k))
    written = []
    for cache, new in ((keys, k), (values, v)):
        token = new.astype(cache.dtype).reshape(1, rows, 1, *cache.shape[3:])
        written.append(jax.lax.dynamic_update_slice(cache, token, (layer, 0, slot, 0, 0)))
    return q, written[0], written[1]


def attend(
    q: Float[Array, "rows all_heads"],
    keys: Float[Array, "layers rows capacity kv_heads head_dim"],
    values: Float[Array, "layers rows capacity kv_heads head_dim"],
    first: Int32[Array, " rows"],
    slot: Int32[Array, ""],
    layer: Int32[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "rows all_heads"]:
    """Attention of one query a row over the slots from `first` to `slot` of a layer's caches.

    Raises:
        ValueError: heads is no multiple of kv_heads.
    """
    rows, capacity, _, head_dim = keys.shape[1:]
    slot = jnp.minimum(slot, capacity - 1)
    slots = jnp.arange(capacity, dtype=jnp.int32)
    seen = (slots >= first[:, None]) & (slots <= slot)
    k, v = (jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (keys, values))
    out = attention(
        q.reshape(rows, 1, q.shape[1] // head_dim, head_dim),
        k,
        # Nothing times what nobody wrote may be not a number.
        jnp.where(seen[:, :, None, None], v, 0),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        q_segments=jnp.ones((rows, 1), jnp.int32),
        kv_segments=seen.astype(jnp.int32),
        q_offset=slot,
    )
    return out.reshape(q.shape)
