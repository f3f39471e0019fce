"""What the registry calls the platform that JAX runs on, and the precision of a product."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxsloth.kernels.registry import Facts, Platform

_NAMES: dict[str, Platform] = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}


def platform() -> Platform:
    return _NAMES.get(jax.default_backend(), "cpu")


def facts_of(dtype: Any) -> Facts:
    return Facts(platform=platform(), dtype=jnp.dtype(dtype).name)


def precision_of(dtype: Any) -> Literal["highest"] | None:
    """float32 means true float32: without this XLA may take TF32 on a GPU."""
    return "highest" if jnp.dtype(dtype) == jnp.float32 else None
