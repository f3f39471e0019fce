"""AdamW with its moments in 8 bits; bitsandbytes' numbers, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsloth.backend import OptimizerOptions
from jaxsloth.jax_backend import devices
from jaxsloth.jax_backend.optimizer import AdamW, names_of
from jaxsloth.kernels.adamw_8bit.contract import ADAMW_8BIT, SMALLEST, Moments, blocks_of, check_stored
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.registry import Target, resolve


class Adam8bitState(NamedTuple):
    """Trees like the parameters: uint8 codes of their shapes, and float32 maxima ``[(stacked,) blocks]``.

    Blocks of the model are stored stacked, and each of a stack is a tensor by itself. Tensors of fewer than 4096 values have
    float32 moments and no maxima.
    """

    count: Any
    exp_avg: Any
    exp_avg_absmax: Any
    exp_avg_sq: Any
    exp_avg_sq_absmax: Any


class AdamW8bit(AdamW):
    """AdamW whose moments are stored as `kernels/adamw_8bit` says."""

    def __init__(self, options: OptimizerOptions, implementation: str | None = None) -> None:
        super().__init__(options)
        self._implementation = implementation

    def _start(self, parameters: Any) -> Adam8bitState:
        def moment(path: Any, parameter: Any) -> Any:
            return jnp.zeros(parameter.shape, jnp.uint8 if _in_8_bits(path, parameter) else jnp.float32)

        def absmax(path: Any, parameter: Any) -> Any:
            lead, size = _tensors(path, parameter)
            return jnp.zeros((*lead, blocks_of(size) if size >= SMALLEST else 0), jnp.float32)

        def all_of(function: Any) -> Any:
            return jax.tree_util.tree_map_with_path(function, parameters)

        return Adam8bitState(jnp.int32(0), all_of(moment), all_of(absmax), all_of(moment), all_of(absmax))

    def trees(self, adam: Adam8bitState) -> dict[str, Any]:
        return {key: tree for key, tree in adam._asdict().items() if key != "count"}

    def with_trees(self, adam: Adam8bitState, count: int, trees: dict[str, Any]) -> Adam8bitState:
        return adam._replace(count=jnp.int32(count), **trees)

    def check(self, state: Mapping[str, np.ndarray]) -> None:
        check_stored(state, eight_bit=True)

    def _update(self, parameters: Any, adam: Adam8bitState, gradients: Any, learning_rate: Any) -> tuple[Any, Adam8bitState]:
        count = adam.count + 1
        # A Pallas call can't be divided by the compiler, so every device runs the whole update.
        everywhere = devices.over_devices(self._update_here, replicated=5, sharded_axis=0)
        new, trees = everywhere(parameters, self.trees(adam), gradients, learning_rate, count)
        return new, adam._replace(count=count, **trees)

    def _update_here(
        self, parameters: Any, trees: dict[str, Any], gradients: Any, learning_rate: Any, count: Any
    ) -> tuple[Any, dict[str, Any]]:
        beta1, beta2 = self.options.betas
        correction, root = _correction(beta1, count), jnp.sqrt(_correction(beta2, count))
        paths, structure = jax.tree_util.tree_flatten_with_path(parameters)
        others = [jax.tree.leaves(tree) for tree in (gradients, *trees.values())]
        done = []
        for (path, parameter), gradient, *kept in zip(paths, *others, strict=True):
            rate, decay = self.rate_and_decay(path, learning_rate)
            factors = jnp.stack([1.0 - rate * decay, rate / correction, root])
            moments = Moments(**dict(zip(trees, kept, strict=True)))
            step = self._step_8_bits if _in_8_bits(path, parameter) else self._step_whole
            after, moments = step(path, parameter, gradient, moments, factors)
            done.append((after, *(getattr(moments, key) for key in trees)))
        new, *found = (jax.tree.unflatten(structure, leaves) for leaves in zip(*done, strict=True))
        return new, dict(zip(trees, found, strict=True))

    def _step_8_bits(self, path: Any, parameter: Any, gradient: Any, moments: Moments, factors: Any) -> tuple[Any, Moments]:
        _, size = _tensors(path, parameter)
        target = Target(platform(), sizes={"values": parameter.size})
        function = resolve(ADAMW_8BIT, "jax", target, self._implementation)
        sizes = (size,) * (parameter.size // size)
        flat = jax.tree.map(lambda array: array.reshape(-1), (parameter, gradient, moments))
        new, after = function(*flat, factors, sizes=sizes, betas=self.options.betas, eps=self.options.eps)
        shaped = jax.tree.map(lambda array, like: array.reshape(like.shape), after, moments)
        return new.reshape(parameter.shape), shaped

    def _step_whole(self, path: Any, parameter: Any, gradient: Any, moments: Moments, factors: Any) -> tuple[Any, Moments]:
        """A step on float32 moments."""
        del path
        (beta1, beta2), (decay, step_size, root) = self.options.betas, factors
        exp_avg = moments.exp_avg * beta1 + gradient * (1.0 - beta1)
        exp_avg_sq = moments.exp_avg_sq * beta2 + gradient * gradient * (1.0 - beta2)
        update = exp_avg * step_size / (jnp.sqrt(exp_avg_sq) / root + self.options.eps)
        after = Moments(exp_avg, moments.exp_avg_absmax, exp_avg_sq, moments.exp_avg_sq_absmax)
        return parameter * decay - update, after


def _correction(beta: float, count: Any) -> Any:
    """1 - beta^count without the cancellation that float32 would bring: at the first step it is off by 5e-5 for 0.999."""
    return -jnp.expm1(count * np.float32(np.log(beta))) if beta > 0 else jnp.float32(1.0)


def _tensors(path: Any, parameter: Any) -> tuple[tuple[int, ...], int]:
    """(the leading axes that count tensors, the values of one): blocks of the model are stacked."""
    stacked = names_of(path)[:2] == ["model", "layers"]
    return parameter.shape[:1] if stacked else (), int(np.prod(parameter.shape[1 if stacked else 0 :]))


def _in_8_bits(path: Any, parameter: Any) -> bool:
    return _tensors(path, parameter)[1] >= SMALLEST


def make_optimizer(options: OptimizerOptions, implementations: Mapping[str, str] | None = None) -> AdamW:
    """The optimizer that `options.name` asks for."""
    if options.name == "adamw":
        return AdamW(options)
    return AdamW8bit(options, (implementations or {}).get(ADAMW_8BIT.name))
