"""The torch backend: PyTorch modules, Triton kernels where they run, torch.distributed for data parallel."""

from __future__ import annotations

import torch

from jaxsloth.backend import BackendName, BuildOptions, DeviceInfo, TensorSource
from jaxsloth.models.spec import ModelSpec
from jaxsloth.torch_backend import placement
from jaxsloth.torch_backend.model import TorchModel, training_passes


class TorchBackend:
    """See `jaxsloth.backend.Backend`."""

    name: BackendName = "torch"

    def devices(self) -> DeviceInfo:
        return placement.device_info()

    def use_device(self, index: int) -> None:
        placement.use_device(index)

    def build(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> TorchModel:
        placement.join_processes()
        placement.CHOICE.built()
        return TorchModel(spec, source, options)

    def training_passes(self, spec: ModelSpec, options: BuildOptions) -> list[str]:
        return training_passes(spec, options)

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize(placement.device())

    def peak_memory(self) -> int | None:
        return placement.peak_memory()

    def barrier(self) -> None:
        placement.barrier()


BACKEND = TorchBackend()
