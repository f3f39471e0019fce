"""Where things run: the device of this process, the process group, and each process' share of a batch."""

from __future__ import annotations

import atexit
import math
import os
import resource
from functools import cache

import numpy as np
import torch
import torch.distributed as dist

from jaxsloth.backend import DeviceInfo
from jaxsloth.device_choice import DeviceChoice

CHOICE = DeviceChoice("torch")


@cache
def join_processes() -> None:
    """Joins torchrun's process group, once; does nothing outside torchrun."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl")
        return
    dist.init_process_group("gloo")
    # gloo's threads that still run when the interpreter ends abort the process: «terminate called without an active exception».
    atexit.register(_leave_processes)


def _leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """This process' device: its GPU under torchrun, else the one chosen (`use_device`), else the first, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", CHOICE.index or 0)))


def use_device(index: int) -> None:
    """See `jaxsloth.backend.Backend`. The device becomes torch's current one, on whose streams work is queued."""
    own = os.environ.get("LOCAL_RANK")
    if own is not None:
        if index != int(own):
            raise ValueError(
                f"device_map asks for device {index}, and torchrun gives this process device {own} (LOCAL_RANK); leave "
                "device_map out"
            )
        return
    on_gpu = torch.cuda.is_available()
    CHOICE.take(index, "cuda" if on_gpu else "cpu", torch.cuda.device_count() if on_gpu else 1, default=0)
    if on_gpu:
        torch.cuda.set_device(index)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device_info() -> DeviceInfo:
    join_processes()
    here = device()
    if here.type == "cpu":
        return DeviceInfo("cpu", "CPU", world_size(), rank(), world_size())
    properties = torch.cuda.get_device_properties(here)
    return DeviceInfo("cuda", properties.name, world_size(), rank(), world_size(), properties.total_memory)


def share(batch_rows: int) -> slice:
    """This process' rows of a global batch.

    Raises:
        ValueError: the rows do not divide among the processes; the data pipeline fills batches up so that they do.
    """
    processes = world_size()
    if batch_rows % processes:
        raise ValueError(f"a batch must have a multiple of {processes} rows (one share a process), and it has {batch_rows}")
    size = batch_rows // processes
    return slice(rank() * size, (rank() + 1) * size)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array of the host on a device; a copy to a GPU does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(values: torch.Tensor) -> None:
    """Adds `values` up over all processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)


def peak_memory() -> int:
    """Peak bytes: allocated on this process' GPU, or resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory that nothing holds, what torch keeps for later given back first; infinite on the CPU."""
    if device.type != "cuda":
        return math.inf
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def host_memory() -> int:
    """Bytes of host memory that can be had: Linux's MemAvailable, elsewhere all there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
