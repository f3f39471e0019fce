"""Where things run: one mesh with a ``data`` axis over all visible devices or the one chosen, and how batches lie on it."""

from __future__ import annotations

import os
import resource
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsloth.backend import DeviceInfo
from jaxsloth.device_choice import DeviceChoice
from jaxsloth.kernels.jax_platform import platform

DATA = "data"
CHOICE = DeviceChoice("jax")


def in_use() -> tuple[jax.Device, ...]:
    """The devices that models run on."""
    visible = tuple(jax.devices())
    return visible if CHOICE.index is None else (visible[CHOICE.index],)


def use_device(index: int) -> None:
    """See `jaxsloth.backend.Backend`. Arrays that no device is named for are made on it, too."""
    count = jax.device_count()
    CHOICE.take(index, platform(), count, default=0 if count == 1 else None)
    jax.config.update("jax_default_device", in_use()[0])


def check_one_process() -> None:
    """ValueError where torchrun or its like started several processes, each of which would do all of the work by itself."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started not in ("", "1") and jax.process_count() == 1:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE, which torchrun and accelerate set), and each would train the whole "
            "run by itself: one process of JAX drives all the devices that it sees; start the script by python alone, or take "
            "backend='torch'"
        )


def torch_device() -> str:
    """What torch calls the device that a model on a single one lies on."""
    return platform() if CHOICE.index is None or platform() == "cpu" else f"{platform()}:{CHOICE.index}"


def mesh() -> Mesh:
    return _mesh(in_use())


@cache
def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return jax.make_mesh((len(devices),), (DATA,), devices=devices)


def keep_compiled_programs() -> None:
    """Has JAX keep the programs that it compiles for a GPU in the user's cache folder, unless a place was chosen already
    (JAX_COMPILATION_CACHE_DIR, or the configuration of that name): a second run then starts seconds sooner."""
    if platform() != "cuda" or jax.config.jax_compilation_cache_dir is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "jaxsloth" / "xla"))
    # By default what took under a second to compile is not kept: dozens of small programs load a model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def device_info() -> DeviceInfo:
    device = in_use()[0]
    stats = device.memory_stats() or {}
    where = platform()
    name = "CPU" if where == "cpu" else device.device_kind
    return DeviceInfo(where, name, len(in_use()), jax.process_index(), jax.process_count(), stats.get("bytes_limit"))


def put(array: np.ndarray) -> Any:
    """An array on the first device that shares its memory with nobody. jnp.asarray would compile a program for every shape."""
    # On the CPU device_put takes aligned memory as it lies, a mapped file's too, whatever may_alias says.
    return jax.device_put(np.array(array) if platform() == "cpu" else array)


def put_batch(array: np.ndarray, axis: int) -> Any:
    """An array on the devices, its batch axis shared out among them.

    Raises:
        ValueError: the rows do not divide among the devices; the data pipeline fills batches up so that they do.
    """
    if len(in_use()) == 1:
        return array  # the program's call moves it, faster than a call of its own would
    rows = array.shape[axis]
    if rows % len(in_use()):
        raise ValueError(f"a batch must have a multiple of {len(in_use())} rows (one share a device), and it has {rows}")
    spec = PartitionSpec(*(DATA if place == axis else None for place in range(array.ndim)))
    return jax.device_put(array, NamedSharding(mesh(), spec))


def replicate(tree: Any) -> Any:
    """Arrays whole on every device."""
    if len(in_use()) == 1:
        return tree
    return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def over_devices(function: Any, replicated: int, sharded_axis: int) -> Any:
    """`function` run on every device's share. Its first `replicated` arguments are whole everywhere, the others are shared out
    along `sharded_axis`; what it returns must be equal on all devices (summed over `DATA`)."""
    if len(in_use()) == 1:
        return function

    def shared(*arguments: Any) -> Any:
        whole = PartitionSpec()
        share = PartitionSpec(*([None] * sharded_axis), DATA)
        specs = tuple(whole if place < replicated else share for place in range(len(arguments)))
        # Pallas calls carry no information on what varies over the mesh.
        mapped = jax.shard_map(function, mesh=mesh(), in_specs=specs, out_specs=whole, check_vma=False)
        return mapped(*arguments)

    return shared


def sum_over_devices(tree: Any) -> Any:
    """The sum over the mesh, inside `over_devices`."""
    return tree if len(in_use()) == 1 else jax.lax.psum(tree, DATA)


def gather_from_devices(tree: Any, axis: int) -> Any:
    """Every device's share along `axis`, put together, inside `over_devices`."""
    return tree if len(in_use()) == 1 else jax.lax.all_gather(tree, DATA, axis=axis, tiled=True)


def free_memory() -> float:
    """Bytes of one device that are not in use; inf where unknown."""
    stats = in_use()[0].memory_stats() or {}
    return float(stats["bytes_limit"] - stats["bytes_in_use"]) if "bytes_limit" in stats else float("inf")


def peak_memory() -> int:
    """Peak bytes: in use on one device, or resident on the host."""
    stats = in_use()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
