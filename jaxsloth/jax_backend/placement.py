"""Where things run: one mesh with a ``data`` axis over all visible devices, and how batches lie on it."""

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
from jaxsloth.kernels.jax_platform import platform

DATA = "data"


@cache
def mesh() -> Mesh:
    return jax.make_mesh((jax.device_count(),), (DATA,))


def keep_compiled_programs() -> None:
    """Has JAX keep the programs that it compiles for a GPU in the user's cache folder, unless a place was chosen already
    (JAX_COMPILATION_CACHE_DIR, or the configuration of that name): a second run then starts seconds sooner."""
    if platform() != "cuda" or jax.config.jax_compilation_cache_dir is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "jaxsloth" / "xla"))


def device_info() -> DeviceInfo:
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    where = platform()
    name = "CPU" if where == "cpu" else device.device_kind
    return DeviceInfo(where, name, jax.device_count(), jax.process_index(), jax.process_count(), stats.get("bytes_limit"))


def put_batch(array: np.ndarray, axis: int) -> Any:
    """An array on the devices, its batch axis shared out among them.

    Raises:
        ValueError: the rows do not divide among the devices; the data pipeline fills batches up so that they do.
    """
    if jax.device_count() == 1:
        return array  # the program's call moves it, faster than a call of its own would
    rows = array.shape[axis]
    if rows % jax.device_count():
        raise ValueError(f"a batch must have a multiple of {jax.device_count()} rows (one share a device), and it has {rows}")
    spec = PartitionSpec(*(DATA if place == axis else None for place in range(array.ndim)))
    return jax.device_put(array, NamedSharding(mesh(), spec))


def replicate(tree: Any) -> Any:
    """Arrays whole on every device."""
    if jax.device_count() == 1:
        return tree
    return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec()))


def over_devices(function: Any, replicated: int, sharded_axis: int) -> Any:
    """`function` run on every device's share. Its first `replicated` arguments are whole everywhere, the others are shared out
    along `sharded_axis`; what it returns must be equal on all devices (summed over `DATA`)."""
    if jax.device_count() == 1:
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
    return tree if jax.device_count() == 1 else jax.lax.psum(tree, DATA)


def gather_from_devices(tree: Any, axis: int) -> Any:
    """Every device's share along `axis`, put together, inside `over_devices`."""
    return tree if jax.device_count() == 1 else jax.lax.all_gather(tree, DATA, axis=axis, tiled=True)


def free_memory() -> float:
    """Bytes of one device that are not in use; inf where unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    return float(stats["bytes_limit"] - stats["bytes_in_use"]) if "bytes_limit" in stats else float("inf")


def peak_memory() -> int:
    """Peak bytes: in use on one device, or resident on the host."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
