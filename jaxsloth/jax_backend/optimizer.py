"""AdamW in optax terms, with global-norm clipping and, in float16, dynamic loss scaling; all on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxsloth.backend import OptimizerOptions

LOSS_SCALE_START, LOSS_SCALE_GROWTH_INTERVAL = 65536.0, 2000


class OptimizerState(NamedTuple):
    """Adam's moments and count, and the loss scale (1 where there is none)."""

    adam: optax.ScaleByAdamState
    loss_scale: Any
    good_steps: Any


class AdamW:
    """Decoupled weight decay, bias correction, eps outside the root (Loshchilov & Hutter 2019, alg. 2)."""

    def __init__(self, options: OptimizerOptions) -> None:
        self.options = options
        self._adam = optax.scale_by_adam(b1=options.betas[0], b2=options.betas[1], eps=options.eps)

    def init(self, parameters: Any) -> OptimizerState:
        start = LOSS_SCALE_START if self.options.loss_scaling else 1.0
        adam: Any = self._adam.init(parameters)
        return OptimizerState(adam, jnp.float32(start), jnp.int32(0))

    def step(
        self, parameters: Any, state: OptimizerState, gradients: Any, learning_rate: Any
    ) -> tuple[Any, OptimizerState, Any, Any]:
        """(new parameters, new state, gradient norm before clipping, skipped): gradients are those of the scaled loss."""
        options = self.options
        if options.loss_scaling:
            gradients = jax.tree.map(lambda g: g / state.loss_scale, gradients)
        norm = optax.global_norm(gradients)
        if options.max_grad_norm is not None:
            # torch's formula: optax's own has no epsilon.
            factor = jnp.minimum(options.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = jax.tree.map(lambda g: g * factor, gradients)
        updates, adam = self._adam.update(gradients, state.adam)
        decay = 1.0 - learning_rate * options.weight_decay

        def apply(path: Any, parameter: Any, update: Any) -> Any:
            kept = parameter if _is_spared(path) else parameter * decay
            return kept - learning_rate * update

        new = jax.tree_util.tree_map_with_path(apply, parameters, updates)
        after: Any = OptimizerState(adam, state.loss_scale, state.good_steps)  # type: ignore[arg-type]
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


def _is_spared(path: Any) -> bool:
    """Biases are not decayed, as in Hugging Face's Trainer."""
    return any(getattr(part, "key", getattr(part, "name", None)) == "bias" for part in path)
