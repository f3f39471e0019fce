"""How long is a training step, and how much memory does it take?  ``python -m benchmarks.step``

LoRA r=16 on all seven projections over random weights of a real shape, labels = inputs, AdamW. Each backend runs in a process
of its own; the table has the median of the steps after warm-up, their range, tokens/s, peak device memory, and the time of the
first step (compilation included).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

WARMUP = 3


def measure(
    backend: str, shape: str, batch: int, length: int, steps: int, quantization: str, checkpointing: Literal["none", "full"]
) -> dict[str, Any]:
    """Times one backend in this process; seconds and bytes."""
    from benchmarks.shapes import RandomSource, shape_spec
    from jaxsloth.backend import BuildOptions, DtypeName, OptimizerOptions, load_backend
    from jaxsloth.models.names import trainable_shapes
    from jaxsloth.training.initialize import initial_adapters
    from jaxsloth.transforms import add_lora, quantize

    engine = load_backend(backend)
    devices = engine.devices()
    base = shape_spec(shape)
    if quantization == "nf4":
        base = quantize(base, nested=False)
    spec = add_lora(base, r=16, alpha=16.0)
    dtype: DtypeName = "bfloat16" if devices.platform == "cuda" else "float32"
    start = time.perf_counter()
    model = engine.build(base, RandomSource(base), BuildOptions(dtype=dtype, gradient_checkpointing=checkpointing))
    values = initial_adapters(spec, "kaiming", 0, model.base_tensor)
    model.add_adapters(spec, values)
    engine.synchronize()
    load = time.perf_counter() - start
    step_function = model.train_step(OptimizerOptions())
    window = _window(spec.embedding.vocab, batch, length)
    times, losses = [], []
    for step in range(WARMUP + steps):
        start = time.perf_counter()
        result = step_function(window, learning_rate=1e-4, step=step, seed=0)
        losses.append(result.floats()[0])
        times.append(time.perf_counter() - start)
    timed = times[WARMUP:]
    return {
        "backend": backend,
        "device": devices.name,
        "dtype": dtype,
        "trained": sum(int(np.prod(s)) for s in trainable_shapes(spec).values()),
        "load_s": load,
        "first_step_s": times[0],
        "median_s": statistics.median(timed),
        "min_s": min(timed),
        "max_s": max(timed),
        "tokens_per_s": batch * length / statistics.median(timed),
        "peak_bytes": engine.peak_memory(),
        "losses": losses,
    }


def _window(vocab: int, batch: int, length: int) -> Any:
    from jaxsloth.batch import IGNORE, Window

    ids = np.random.Generator(np.random.Philox(1)).integers(0, vocab, (1, batch, length), dtype=np.int32)
    targets = np.full_like(ids, IGNORE)
    targets[..., :-1] = ids[..., 1:]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    rows = np.arange(batch, dtype=np.int32)[None]
    return Window(ids, targets, np.ones_like(ids), np.ascontiguousarray(positions), rows, batch * (length - 1))


def main(
    shape: Annotated[str, typer.Option(help="tiny, 1b or 8b")] = "1b",
    batch: int = 2,
    length: int = 512,
    steps: int = 8,
    quantization: Annotated[str, typer.Option(help="nf4 or none")] = "nf4",
    gradient_checkpointing: Annotated[Literal["none", "full"], typer.Option()] = "none",
    backends: Annotated[str, typer.Option(help="comma-separated")] = "torch,jax",
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path | None, typer.Option(help="where to write the numbers as JSON")] = None,
) -> None:
    """Times a training step of each backend on random weights."""
    if worker is not None:
        print(json.dumps(measure(worker, shape, batch, length, steps, quantization, gradient_checkpointing)))
        return
    results = []
    for backend in backends.split(","):
        command = [sys.executable, "-m", "benchmarks.step", "--worker", backend, "--shape", shape, "--batch", str(batch)]
        command += ["--length", str(length), "--steps", str(steps), "--quantization", quantization]
        command += ["--gradient-checkpointing", gradient_checkpointing]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            raise typer.Exit(done.returncode)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"{shape}, {quantization}, {batch}×{length}, gradient checkpointing {gradient_checkpointing}")
    for column in ("backend", "device", "median ms", "min–max ms", "tokens/s", "peak GiB", "load s", "first step s", "loss"):
        table.add_column(column, justify="right")
    for r in results:
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"
        span = f"{r['min_s'] * 1e3:.1f}–{r['max_s'] * 1e3:.1f}"
        table.add_row(
            r["backend"],
            r["device"],
            f"{r['median_s'] * 1e3:.1f}",
            span,
            f"{r['tokens_per_s']:.0f}",
            peak,
            f"{r['load_s']:.1f}",
            f"{r['first_step_s']:.1f}",
            f"{r['losses'][0]:.4f}→{r['losses'][-1]:.4f}",
        )
    Console(width=140).print(table)
    if output is not None:
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
