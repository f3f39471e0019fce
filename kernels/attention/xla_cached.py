"""One token a row against KV caches, in plain JAX; see the contract."""

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
    keys: Float[Array, "rows capacity kv_heads head_dim"],
    values: Float[Array, "rows capacity kv_heads head_dim"],
    slot: Int32[Array, ""],
) -> tuple[Array, Array, Array]:
    """(q turned, the caches with this token's turned k, and v, at ``[:, slot]``).

    Raises:
        ValueError: the tables turn more channels than a head has.
    """
    rows, head_dim = q.shape[0], keys.shape[3]
    if tables is not None:
        cos, sin = (table.reshape(rows, 1, table.shape[-1]) for table in tables)
        q, k = (rope(t.reshape(rows, 1, t.shape[1] // head_dim, head_dim), cos, sin).reshape(t.shape) for t in (q, k))
    written = []
    for cache, new in ((keys, k), (values, v)):
        token = new.astype(cache.dtype).reshape(rows, 1, *cache.shape[2:])
        written.append(jax.lax.dynamic_update_slice(cache, token, (0, slot, 0, 0)))
    return q, written[0], written[1]


def attend(
    q: Float[Array, "rows all_heads"],
    keys: Float[Array, "rows capacity kv_heads head_dim"],
    values: Float[Array, "rows capacity kv_heads head_dim"],
    first: Int32[Array, " rows"],
    slot: Int32[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "rows all_heads"]:
    """Attention of one query a row over the slots from `first` to `slot`.

    Raises:
        ValueError: heads is no multiple of kv_heads.
    """
    rows, capacity, _, head_dim = keys.shape
    slot = jnp.minimum(slot, capacity - 1)
    slots = jnp.arange(capacity, dtype=jnp.int32)
    seen = (slots >= first[:, None]) & (slots <= slot)
    out = attention(
        q.reshape(rows, 1, q.shape[1] // head_dim, head_dim),
        keys,
        # Nothing times what nobody wrote may be not a number.
        jnp.where(seen[:, :, None, None], values, 0),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        q_segments=jnp.ones((rows, 1), jnp.int32),
        kv_segments=seen.astype(jnp.int32),
        q_offset=slot,
    )
    return out.reshape(q.shape)
