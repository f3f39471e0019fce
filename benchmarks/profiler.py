"""Which kernels really ran, from a profiler's trace: [{"name", "calls", "ms"}], the longest in total first."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

MOST = 25


def kernels_of(framework: Literal["torch", "jax"], run: Callable[[], object]) -> list[dict[str, Any]]:
    """The kernels of one run. On a CPU: torch's operators by their own time; JAX's trace has nothing of the kind."""
    return _torch(run) if framework == "torch" else _jax(run)


def _top(durations_us: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, duration in durations_us:
        total[name] += duration
        calls[name] += 1
    longest = sorted(total, key=lambda name: -total[name])[:MOST]
    return [{"name": name[:120], "calls": calls[name], "ms": round(total[name] / 1e3, 3)} for name in longest]


def _torch(run: Callable[[], object]) -> list[dict[str, Any]]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu, cuda = torch.cuda.is_available(), torch.autograd.DeviceType.CUDA
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        run()
    events = trace.events() or []
    if on_gpu:
        on_device = (event for event in events if event.device_type == cuda and not event.is_user_annotation)
        return _top((event.name, event.time_range.elapsed_us()) for event in on_device)
    return _top((event.name, event.self_cpu_time_total) for event in events)


def _jax(run: Callable[[], object]) -> list[dict[str, Any]]:
    import jax
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = ProfileData.from_file(str(file)).planes
        return _top(
            (event.name, event.duration_ns / 1e3)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")  # the other lines repeat the same time by module and by HLO operation
            for event in line.events
        )
