"""Base weights on their way in: read one at a time, checked, quantized where the spec says, and stacked by block."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsloth.backend import TensorSource
from jaxsloth.convert.fitting import check_cast
from jaxsloth.jax_backend import devices
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.nf4.contract import QUANTIZE, Nested
from jaxsloth.kernels.nf4.xla_ops import NF4  # from here, since this module makes it a pytree
from jaxsloth.kernels.registry import Target, resolve
from jaxsloth.models.names import stacked_name, tensor_shapes
from jaxsloth.models.spec import ModelSpec


@partial(jax.jit, static_argnums=(1,))
def _room(parts: Any, count: int) -> Any:
    return jax.tree.map(lambda part: jnp.zeros((count, *part.shape), part.dtype), parts)


@partial(jax.jit, donate_argnums=(0,))
def _put(stack: Any, parts: Any, place: Any) -> Any:
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, place, 0), stack, parts)


@jax.jit
def _finite(array: Any) -> Any:
    return jnp.isfinite(array).all()


def load_weights(spec: ModelSpec, source: TensorSource, dtype: Any) -> dict[str, Any]:
    """Every base weight on the device: those of blocks stacked ``[layers, …]`` under `stacked_name`.

    Raises:
        ValueError: a tensor is missing, has another shape than the spec says, or is not finite; the message names it.
    """
    period = spec.layer_period()
    count = len(spec.layers) // period
    quantize = resolve(QUANTIZE, "jax", Target(platform()))
    nested = spec.quantization.nested if spec.quantization is not None else False
    quantized = {f"{module}.weight" for module in spec.quantization.modules} if spec.quantization is not None else set()
    found: dict[str, Any] = {}
    stacks: dict[str, Any] = {}
    checks: dict[str, Any] = {}
    for name, value in _arrivals(spec, source):
        if not isinstance(value, NF4):
            cast = value if name in quantized else value.astype(dtype)
            checks[name] = _finite(value), _finite(cast)
            value = quantize(value, nested=nested) if name in quantized else cast
        key, place = stacked_name(name, period)
        found.setdefault(key, value)
        if name.startswith("model.layers."):
            parts = _parts(value)
            stacks[key] = _put(stacks[key] if key in stacks else _room(parts, count), parts, place)
    for name, (finite, fits) in checks.items():  # at the end, since each answer is waited for
        if not finite:
            raise ValueError(f"tensor {name} holds NaN or infinite values; the checkpoint is damaged")
        if not fits:
            check_cast(name, source.read(name), dtype)
    return found | {key: _whole(stack, found[key]) for key, stack in stacks.items()}


def _arrivals(spec: ModelSpec, source: TensorSource) -> Iterator[tuple[str, Any]]:
    """(name, weight on the device) of every tensor; the next one is on its way while one is used."""
    shapes, present = tensor_shapes(spec), set(source.names())

    def take(name: str) -> Any:
        if name not in present:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        if tuple(source.shape(name)) != shapes[name]:
            raise ValueError(f"tensor {name} must have the shape {shapes[name]}, and it has {tuple(source.shape(name))}")
        value = source.read(name)
        if not isinstance(value, NF4) and value.dtype == np.float64:  # JAX has none, and would make it float32 itself
            check_cast(name, value, np.float32)
        return jax.tree.map(devices.put, value if isinstance(value, NF4) else np.asarray(value))

    names = list(shapes)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(take, names[0])
        for name, following in zip_longest(names, names[1:]):
            value = coming.result()
            if following is not None:
                coming = reader.submit(take, following)
            yield name, value


def _parts(value: Any) -> tuple[Any, ...]:
    """What of a block's weight is stacked; one code book serves all blocks."""
    if not isinstance(value, NF4):
        return (value,)
    nested = value.nested
    return (value.codes, value.absmax, *(() if nested is None else (nested.absmax, nested.offset)))


def _whole(stack: tuple[Any, ...], one: Any) -> Any:
    """`_parts` of all blocks as a weight like `one` of them."""
    if not isinstance(one, NF4):
        return stack[0]
    codes, absmax, *outer = stack
    return NF4(codes, absmax, None if one.nested is None else Nested(outer[0], outer[1], one.nested.code), one.shape)
