"""AdamW in optax terms, with global-norm clipping and, in float16, dynamic loss scaling; all on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsloth.backend import OptimizerOptions
from jaxsloth.kernels.adamw_8bit.contract import check_stored
from jaxsloth.models.names import is_embedding

LOSS_SCALE_START, LOSS_SCALE_GROWTH_INTERVAL = 65536.0, 2000


class OptimizerState(NamedTuple):
    """Adam's moments and count (an optax.ScaleByAdamState, or in 8 bits `Adam8bitState`), and the loss scale (1 where there is
    none)."""

    adam: Any
    loss_scale: Any
    good_steps: Any


class AdamW:
    """Decoupled weight decay, bias correction, eps outside the root (Loshchilov & Hutter 2019, alg. 2)."""

    def __init__(self, options: OptimizerOptions) -> None:
        self.options = options
        self._adam = optax.scale_by_adam(b1=options.betas[0], b2=options.betas[1], eps=options.eps)

    def init(self, parameters: Any) -> OptimizerState:
        start = LOSS_SCALE_START if self.options.loss_scaling else 1.0
        return OptimizerState(self._start(parameters), jnp.float32(start), jnp.int32(0))

    def _start(self, parameters: Any) -> Any:
        return self._adam.init(parameters)

    def trees(self, adam: Any) -> dict[str, Any]:
        """What Adam keeps, by the names that a checkpoint has for it; each like the parameters."""
        return {"exp_avg": adam.mu, "exp_avg_sq": adam.nu}

    def with_trees(self, adam: Any, count: int, trees: dict[str, Any]) -> Any:
        return adam._replace(count=jnp.int32(count), mu=trees["exp_avg"], nu=trees["exp_avg_sq"])

    def check(self, state: Mapping[str, np.ndarray]) -> None:
        check_stored(state, eight_bit=False)

    def _update(self, parameters: Any, adam: Any, gradients: Any, learning_rate: Any) -> tuple[Any, Any]:
        """(new parameters, new moments) by gradients that are ready."""
        updates, adam = self._adam.update(gradients, adam)

        def apply(path: Any, parameter: Any, update: Any) -> Any:
            rate, decay = self.rate_and_decay(path, learning_rate)
            return parameter * (1.0 - rate * decay) - rate * update

        return jax.tree_util.tree_map_with_path(apply, parameters, updates), adam

    def rate_and_decay(self, path: Any, learning_rate: Any) -> tuple[Any, Any]:
        """(learning rate, weight decay) of a parameter. Biases are not decayed, as in Hugging Face's Trainer."""
        names = names_of(path)
        rate = learning_rate * self.options.embedding_rate if is_embedding(names) else learning_rate
        return rate, 0.0 if "bias" in names else self.options.weight_decay

    def step(
        self, parameters: Any, state: OptimizerState, gradients: Any, learning_rate: Any, frozen: Any = None
    ) -> tuple[Any, OptimizerState, Any, Any]:
        """(new parameters, new state, gradient norm before clipping, skipped): gradients are those of the scaled loss.

        frozen: a tree like the parameters, not 0 where they stay as they are (it broadcasts); None: nowhere.
        """
        options = self.options
        if frozen is not None:
            gradients = jax.tree.map(lambda mask, g: jnp.where(mask != 0, 0, g), frozen, gradients)
        if options.loss_scaling:
            gradients = jax.tree.map(lambda g: g / state.loss_scale, gradients)
        norm = optax.global_norm(gradients)
        if options.max_grad_norm is not None:
            # torch's formula: optax's own has no epsilon.
            factor = jnp.minimum(options.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = jax.tree.map(lambda g: g * factor, gradients)
        new, adam = self._update(parameters, state.adam, gradients, learning_rate)
        if frozen is not None:
            new = jax.tree.map(lambda mask, old, own: jnp.where(mask != 0, old, own), frozen, parameters, new)
        after = OptimizerState(adam, state.loss_scale, state.good_steps)
        if not options.loss_scaling:
            return new, after, norm, jnp.bool_(False)
        finite = jnp.isfinite(norm)
        new, adam = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (new, adam), (parameters, state.adam))
        return new, OptimizerState(adam, *_adapt_scale(state, finite)), norm, ~finite


def _adapt_scale(state: OptimizerState, finite: Any) -> tuple[Any, Any]:
    good = jnp.where(finite, state.good_steps + 1, 0)
    grows = good == LOSS_SCALE_GROWTH_INTERVAL
    scale = jnp.where(finite, jnp.where(grows, state.loss_scale * 2, state.loss_scale), state.loss_scale / 2)
    return scale, jnp.where(grows, 0, good)


def names_of(path: Any) -> list[Any]:
    return [getattr(part, "key", getattr(part, "name", None)) for part in path]
