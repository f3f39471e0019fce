"""The token embedding: its scale, and the noise that a training step adds."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.linear import Frozen, Trained
from jaxsloth.models import spec as specs


class Embedding(nnx.Module):
    """The token table, frozen in the compute dtype, or trained in float32."""

    def __init__(self, weight: Any, spec: specs.Embedding, dtype: Any) -> None:
        self.weight = weight if isinstance(weight, Trained) else Frozen(weight)
        self._scale, self._dtype = spec.scale, dtype

    def forward(self, ids: Any, noise: Any = None) -> Any:
        """``[..., hidden]`` in the compute dtype; noise: float32, what is added to the embeddings."""
        x = self.weight[...][ids].astype(self._dtype)
        if self._scale != 1.0:
            x = x * jnp.asarray(self._scale, self._dtype)
        return x if noise is None else x + noise.reshape(x.shape).astype(self._dtype)
