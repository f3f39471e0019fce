"""The keys and values that decoding keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The keys and values of one layer, ``[batch, capacity, kv_heads, head_dim]``."""

    keys: Any
    values: Any

    def append(self, keys: Any, values: Any, used: Any) -> Cache:
        """The cache with slots ``used …`` written."""
        return Cache(
            jax.lax.dynamic_update_slice_in_dim(self.keys, keys, used, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.values, values, used, axis=1),
        )
