"""What the registry calls the platform that JAX runs on, and products at the precision that a dtype means."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxsloth.kernels.registry import Platform, Target

_NAMES: dict[str, Platform] = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}


def platform() -> Platform:
    return _NAMES.get(jax.default_backend(), "cpu")


def target_of(dtype: Any) -> Target:
    return Target(platform=platform(), dtype=jnp.dtype(dtype).name)


def precision_of(dtype: Any) -> Literal["highest"] | None:
    """float32 means true float32: without this XLA may take TF32 on a GPU."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None


def dot_float32(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """The product of two matrices over axis contract[0] of a and contract[1] of b, summed in float32; inside kernels too."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)
