"""JAX programs for a GPU, made without one."""

from __future__ import annotations

import jax


def lowered_for_cuda(function, *arguments) -> str:
    """The program for a GPU, made without one."""
    traced = jax.jit(function).trace(*arguments)
    if jax.__version_info__ < (0, 11):
        return traced.lower(lowering_platforms=("cuda",)).as_text()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return traced.lower(lowering_platforms=("cuda",)).as_text()
