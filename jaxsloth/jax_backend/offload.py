"""Arrays on their way to the host's memory and back."""

from __future__ import annotations

from typing import Any

import jax


def to_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), tree)
