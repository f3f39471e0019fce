"""What is shown of conversions and of checkpoints: tables, progress, JSON."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from jaxsloth.convert.checkpoint import find_checkpoint
from jaxsloth.convert.files import present_size
from jaxsloth.convert.gguf_adapter import describe_gguf_adapter, is_gguf_adapter
from jaxsloth.convert.gguf_source import GgufSource
from jaxsloth.convert.peft_adapter import CONFIG, read_adapter
from jaxsloth.convert.run import ADAPTERS, Plan, convert
from jaxsloth.foreign import local_path

_MIB, _GIB = 2**20, 2**30


def show_plan(plan: Plan, console: Console, *, whole: bool) -> None:
    """Kinds of storage with their counts and sizes; whole: every tensor too."""
    if whole:
        table = Table("tensor", "shape", "stored as", "MiB")
        for tensor in plan.tensors:
            table.add_row(tensor.name, str(list(tensor.shape)), tensor.stored_as, f"{tensor.nbytes / _MIB:.2f}")
        console.print(table)
    counts = Counter(tensor.stored_as for tensor in plan.tensors)
    kinds = ", ".join(f"{count} in {kind}" for kind, count in counts.most_common())
    kind = "adapter" if plan.to in ADAPTERS else plan.checkpoint.kind
    console.print(f"{kind} to {plan.to}: {len(plan.tensors)} tensors ({kinds}), {plan.nbytes / _GIB:.2f} GiB")
    for note in plan.notes:
        console.print(f"note: {note}")


def converted(plan: Plan, console: Console) -> Path:
    """`convert` with a progress bar, and a line at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("converting", total=plan.nbytes)
        path = convert(plan, lambda count: progress.advance(task, count))
    seconds, size = time.perf_counter() - start, present_size(path)
    console.print(f"wrote {path}: {size / _GIB:.2f} GiB in {seconds:.1f} s ({size / seconds / 1e9:.2f} GB/s)")
    return path


def describe(name: str) -> dict[str, Any]:
    """What a checkpoint or an adapter holds, as JSON would.

    Raises:
        CheckpointError: it can't be read, or does not hold what its config says.
    """
    folder = local_path(name, "the checkpoint")
    if (folder / CONFIG).is_file():
        config, values = read_adapter(folder, dora=True)
        return {
            "kind": "PEFT adapter",
            "path": str(folder),
            "base": config.base_model,
            "r": config.r,
            "alpha": config.alpha,
            "targets": config.targets,
            "tensors": {key: {"shape": list(value.shape), "dtype": "F32"} for key, value in values.items()},
            "values": sum(value.size for value in values.values()),
            "bytes": present_size(folder),
        }
    if is_gguf_adapter(folder):
        return describe_gguf_adapter(folder)
    checkpoint = find_checkpoint(name, to_convert=True)
    spec, source = checkpoint.spec(), checkpoint.source
    shapes = {key: tuple(int(size) for size in source.shape(key)) for key in source.names()}
    attention = spec.layers[0].attention
    return {
        "kind": checkpoint.kind,
        "path": str(checkpoint.path),
        "family": spec.family,
        "layers": len(spec.layers),
        "hidden": spec.hidden,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "vocabulary": spec.embedding.vocab,
        "context": spec.max_positions,
        "tied": spec.head.tied,
        "tensors": {key: {"shape": list(shape), "dtype": _kind(source, key)} for key, shape in shapes.items()},
        "values": sum(int(np.prod(shape)) for shape in shapes.values()),
        "bytes": present_size(checkpoint.path),
    }


def _kind(source: Any, name: str) -> str:
    return source.block_type(name) if isinstance(source, GgufSource) else source.stored_as(name)


def show_description(found: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False)
    for key, value in found.items():
        if key not in ("tensors", "values", "bytes"):
            table.add_row(key, str(value))
    stored = Counter(tensor["dtype"] for tensor in found["tensors"].values())
    table.add_row("tensors", ", ".join(f"{count} in {kind}" for kind, count in stored.most_common()))
    table.add_row("values", f"{found['values']:,}")
    table.add_row("on disk", f"{found['bytes'] / _MIB:,.1f} MiB")
    console.print(table)
