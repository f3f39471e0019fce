"""Base weights on their way in: read one at a time, checked, quantized where the spec says, and stacked by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsloth.backend import TensorSource
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.nf4.contract import QUANTIZE, Nested
from jaxsloth.kernels.nf4.xla_ops import NF4  # from here, since this module makes it a pytree
from jaxsloth.kernels.registry import Facts, resolve
from jaxsloth.models.names import stacked_name, tensor_shapes
from jaxsloth.models.spec import ModelSpec


@partial(jax.jit, donate_argnums=(0,))
def _put(buffer: Any, value: Any, index: Any) -> Any:
    return jax.lax.dynamic_update_index_in_dim(buffer, value, index, 0)


def load_weights(spec: ModelSpec, source: TensorSource, dtype: Any) -> dict[str, Any]:
    """Every base weight on the device: those of blocks stacked ``[layers, …]`` under `stacked_name`.

    Raises:
        ValueError: a tensor is missing, has another shape than the spec says, or is not finite; the message names it.
    """
    period = spec.layer_period()
    count = len(spec.layers) // period
    take = _reader(spec, source, dtype)
    found: dict[str, Any] = {}
    for name in tensor_shapes(spec):
        key, place = stacked_name(name, period)
        value = take(name)
        if not name.startswith("model.layers."):
            found[key] = value
            continue
        found[key] = _add_to_stack(found.get(key), value, place, count)
    return found


def _add_to_stack(stack: Any, value: Any, place: int, count: int) -> Any:
    """The stack with one more block's weight in it; begun with room for `count` where there is none."""
    if not isinstance(value, NF4):
        if stack is None:
            stack = jnp.zeros((count, *value.shape), value.dtype)
        return _put(stack, value, place)
    codes = _add_to_stack(None if stack is None else stack.codes, value.codes, place, count)
    absmax = _add_to_stack(None if stack is None else stack.absmax, value.absmax, place, count)
    nested = value.nested
    if nested is not None:
        before = None if stack is None else stack.nested
        outer = _add_to_stack(None if before is None else before.absmax, nested.absmax, place, count)
        offset = _add_to_stack(None if before is None else before.offset, nested.offset, place, count)
        nested = Nested(outer, offset, nested.code)  # one code book serves all blocks
    return NF4(codes, absmax, nested, value.shape)


def _reader(spec: ModelSpec, source: TensorSource, dtype: Any) -> Callable[[str], Any]:
    shapes, present = tensor_shapes(spec), set(source.names())
    nested = spec.quantization.nested if spec.quantization is not None else False
    quantized = {f"{module}.weight" for module in spec.quantization.modules} if spec.quantization is not None else set()
    quantize = resolve(QUANTIZE, "jax", Facts(platform()))

    def take(name: str) -> Any:
        if name not in present:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        if tuple(source.shape(name)) != shapes[name]:
            raise ValueError(f"tensor {name} must have the shape {shapes[name]}, and it has {tuple(source.shape(name))}")
        value = source.read(name)
        if isinstance(value, NF4):
            return jax.tree.map(jnp.asarray, value)
        array = jnp.asarray(np.asarray(value))
        if not bool(jnp.isfinite(array).all()):
            raise ValueError(f"tensor {name} holds NaN or infinite values; the checkpoint is damaged")
        return quantize(array, nested=nested) if name in quantized else array.astype(dtype)

    return take
