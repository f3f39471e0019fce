"""The JAX backend: flax.nnx modules, Pallas kernels where they run, one mesh over all visible devices."""

from __future__ import annotations

import jax

from jaxsloth.backend import BackendName, BuildOptions, DeviceInfo, TensorSource
from jaxsloth.jax_backend import devices
from jaxsloth.jax_backend.model import JaxModel
from jaxsloth.jax_backend.state import training_passes
from jaxsloth.models.spec import ModelSpec


class JaxBackend:
    """See `jaxsloth.backend.Backend`."""

    name: BackendName = "jax"

    def devices(self) -> DeviceInfo:
        return devices.device_info()

    def use_device(self, index: int) -> None:
        devices.use_device(index)

    def build(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> JaxModel:
        devices.keep_compiled_programs()
        devices.CHOICE.built()
        return JaxModel(spec, source, options)

    def training_passes(self, spec: ModelSpec, options: BuildOptions) -> list[str]:
        return training_passes(spec, options)

    def synchronize(self) -> None:
        jax.effects_barrier()
        for device in devices.in_use():
            jax.device_put(0, device).block_until_ready()

    def peak_memory(self) -> int | None:
        return devices.peak_memory()

    def barrier(self) -> None:
        """One process drives all devices; there is nothing to wait for."""


BACKEND = JaxBackend()
