"""The torch backend: PyTorch modules, Triton kernels where they run, torch.distributed for data parallel."""

from __future__ import annotations

import torch

from jaxsloth.backend import BackendName, BuildOptions, DeviceInfo, TensorSource
from jaxsloth.models.spec import ModelSpec
from jaxsloth.torch_backend import devices
from jaxsloth.torch_backend.model import TorchModel, training_passes


class TorchBackend:
    """See `jaxsloth.backend.Backend`."""

    name: BackendName = "torch"

    def devices(self) -> DeviceInfo:
        return devices.device_info()

    def use_device(self, index: int) -> None:
        devices.use_device(index)

    def build(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> TorchModel:
        devices.join_processes()
        devices.CHOICE.built()
        return TorchModel(spec, source, options)

    def training_passes(self, spec: ModelSpec, options: BuildOptions) -> list[str]:
        return training_passes(spec, options)

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize(devices.device())

    def peak_memory(self) -> int | None:
        return devices.peak_memory()

    def barrier(self) -> None:
        devices.barrier()


BACKEND = TorchBackend()
