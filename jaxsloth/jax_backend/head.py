"""The language-model head: logits, and the loss that never forms them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxsloth.batch import IGNORE
from jaxsloth.jax_backend.linear import Frozen, Trained
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.kernels.jax_platform import precision_of


class HeadWeight(nnx.Module):
    """An untied head's table, frozen in the compute dtype, or trained in float32."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight if isinstance(weight, Trained) else Frozen(weight)


@dataclass(frozen=True)
class Head:
    """weight ``[vocab, hidden]`` in the compute dtype; trains: gradients of it are wanted."""

    weight: Any
    trains: bool
    soft_cap: float | None
    ops: Ops

    def forward(self, hidden: Any) -> Any:
        """Logits float32 ``[..., vocab]`` of normed hidden states."""
        logits = jnp.einsum(
            "...h,vh->...v", hidden, self.weight, precision=precision_of(hidden.dtype), preferred_element_type=jnp.float32
        )
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def loss(self, hidden: Any, targets: Any, most: int, per_token: bool = False, label_smoothing: float = 0.0) -> Any:
        """The cross-entropy over all targets, summed or every position's in the targets' shape.

        hidden ``[tokens, hidden]``; most: there are no more targets than this many, which selects them before the product.
        """
        shape, targets, tokens = targets.shape, targets.reshape(-1), hidden.shape[0]
        target_positions = None
        if most < tokens:
            target_positions = jnp.nonzero(targets != IGNORE, size=most, fill_value=tokens)[0]
            hidden = hidden.at[target_positions].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
            targets = targets.at[target_positions].get(mode="fill", fill_value=IGNORE)
        loss = self.ops.linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            soft_cap=self.soft_cap,
            per_token=per_token,
            label_smoothing=label_smoothing,
            train_weight=self.trains,
        )
        if per_token and target_positions is not None:
            loss = jnp.zeros(tokens).at[target_positions].set(loss, mode="drop")
        return loss.reshape(shape) if per_token else loss
