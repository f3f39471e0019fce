"""JAX programs for devices that are not here."""

from __future__ import annotations

import jax

_DEVICES = {"cuda": "NVIDIA H200", "tpu": "TPU v5 lite"}


def lowered_for(platform: str, function, *arguments, **settings) -> str:
    """The program of a jitted function, as it would be handed to a platform's compiler."""
    traced = function.trace(*arguments, **settings)
    if jax.__version_info__ < (0, 11):
        return traced.lower(lowering_platforms=(platform,)).as_text()
    device = jax.sharding.AbstractDevice(device_kind=_DEVICES[platform], num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return traced.lower(lowering_platforms=(platform,)).as_text()


def lowered_for_cuda(function, *arguments) -> str:
    return lowered_for("cuda", jax.jit(function), *arguments)
