"""How fast is each implementation of each op?  ``python -m benchmarks.ops --shape 8b --ops rms_norm,attention``

Every implementation at the sizes of one layer of a real model, on random arrays: the forward alone, and with the backward to
what a training step differentiates. JAX functions are jitted. A time is the best of five means, each over about 0.1 s. An
implementation that refuses or fails says why; an op that benchmarks.op_cases does not know is named as not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import report
from benchmarks.launch import ROOT, default_dtype
from benchmarks.op_cases import Bound, bind, real_cases
from jaxsloth.backend import BackendName
from jaxsloth.kernels.registry import RefusedError, Target, all_ops


def measure(backend: BackendName, shape: str, batch: int, length: int, dtype: str, wanted: list[str]) -> list[dict[str, Any]]:
    """Every implementation of `backend` in this process: milliseconds, or an error's first line."""
    to_device, timers, platform = (_torch_tools if backend == "torch" else _jax_tools)()
    found: list[dict[str, Any]] = []
    for op in all_ops():
        if wanted and op.name not in wanted:
            continue
        cases = list(real_cases(op.name, shape, batch, length))
        if not cases:
            found.append({"op": op.name, "case": "", "implementation": "", "error": "not measured: it has no case"})
        for case in cases:
            target = Target(platform, dtype, {"hidden": getattr(case, "hidden", 0)})  # type: ignore[arg-type]
            for implementation in op.of(backend):
                line: dict[str, Any] = {"op": op.name, "case": case.name, "implementation": implementation.name}
                try:
                    line |= timers(bind(op, backend, target, implementation.name, case, to_device))
                except RefusedError as error:
                    line["error"] = str(error).rpartition("can't run here: ")[2]
                except Exception as error:
                    line["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                found.append(line)
    return found


def best_ms(run: Callable[[], Any], wait: Callable[[Any], None]) -> float:
    """Milliseconds a call: the best of five means, each over as many calls as take about 0.1 s."""
    wait(run())
    start = time.perf_counter()
    wait(run())
    calls = int(np.clip(0.1 / max(time.perf_counter() - start, 1e-6), 1, 1000))
    means = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls - 1):
            run()
        wait(run())
        means.append((time.perf_counter() - start) / calls)
    return min(means) * 1e3


def _torch_tools() -> tuple[Callable[[np.ndarray], Any], Callable[[Bound], dict[str, float]], str]:
    import torch

    from jaxsloth.torch_backend.weights import to_torch

    platform = "cuda" if torch.cuda.is_available() else "cpu"

    def wait(_: Any) -> None:
        if platform == "cuda":
            torch.cuda.synchronize()

    def both(bound: Bound) -> None:
        output = bound.forward(bound.arrays)
        torch.autograd.grad(output, [bound.arrays[name] for name in bound.wrt], bound.dy.to(output.dtype))

    def timers(bound: Bound) -> dict[str, float]:
        with torch.no_grad():
            times = {"forward_ms": best_ms(lambda: bound.forward(bound.arrays), wait)}
        if bound.wrt:
            for name in bound.wrt:
                bound.arrays[name].requires_grad_()
            times["both_ms"] = best_ms(lambda: both(bound), wait)
        return times

    return (lambda array: to_torch(array).reshape(array.shape).to(platform)), timers, platform


def _jax_tools() -> tuple[Callable[[np.ndarray], Any], Callable[[Bound], dict[str, float]], str]:
    import jax
    import jax.numpy as jnp

    from jaxsloth.kernels.jax_platform import platform

    def timers(bound: Bound) -> dict[str, float]:
        def both(arrays: dict[str, Any], dy: Any) -> Any:
            output, pull = jax.vjp(lambda leaves: bound.forward(arrays | leaves), {name: arrays[name] for name in bound.wrt})
            return output, pull(dy.astype(output.dtype))

        # Arrays are arguments: what a jitted function closes over is a constant, and may be folded.
        forward = jax.jit(bound.forward) if bound.jit else bound.forward
        times = {"forward_ms": best_ms(lambda: forward(bound.arrays), jax.block_until_ready)}
        if bound.wrt:
            jitted = jax.jit(both)
            times["both_ms"] = best_ms(lambda: jitted(bound.arrays, bound.dy), jax.block_until_ready)
        return times

    return jnp.asarray, timers, platform()


def main(
    shape: Annotated[str, typer.Option(help="tiny, 1b or 8b")] = "tiny",
    batch: int = 2,
    length: int = 2048,
    ops: Annotated[str, typer.Option(help="comma-separated op names; default: all")] = "",
    backends: Annotated[str, typer.Option(help="comma-separated")] = "torch,jax",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file")] = None,
    worker: Annotated[Path | None, typer.Option(hidden=True, help="write one backend's lines here")] = None,
) -> None:
    """Times every implementation of the ops, each backend in a process of its own."""
    wanted = [name for name in ops.split(",") if name]
    unknown = sorted(set(wanted) - {op.name for op in all_ops()})
    if unknown:
        raise typer.BadParameter(f"--ops knows {[op.name for op in all_ops()]}, not {unknown}")
    chosen = dtype or default_dtype()
    if worker is not None:
        lines = measure(backends, shape, batch, length, chosen, wanted)  # type: ignore[arg-type]
        worker.write_text(json.dumps(lines), encoding="utf-8")
        return
    lines = []
    for backend in backends.split(","):
        with tempfile.TemporaryDirectory() as own:
            file = Path(own) / "lines.json"
            command = [sys.executable, "-m", "benchmarks.ops", "--shape", shape, "--batch", str(batch), "--length", str(length)]
            command += ["--ops", ops, "--backends", backend, "--dtype", chosen, "--worker", str(file)]
            done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode != 0:
                said = (done.stderr.splitlines() or ["nothing was said"])[-1]
                lines.append({"op": "all", "case": "", "implementation": "", "backend": backend, "error": said})
                continue
            lines += [{"backend": backend, **line} for line in json.loads(file.read_text(encoding="utf-8"))]
    lines.sort(key=lambda line: (line["op"], line["case"]))
    columns = ("op", "case", "backend", "implementation", "forward ms", "forward + backward ms", "failed")
    title = f"ops of {shape}, {chosen}, {batch}×{length}"
    report.print_table(title, columns, [_cells(line) for line in lines])
    if output is not None:
        report.save(output, "ops", {title: {"results": lines}})


def _cells(line: dict[str, Any]) -> list[str]:
    times = [f"{line[key]:.3f}" if key in line else "" for key in ("forward_ms", "both_ms")]
    return [line["op"], line["case"], line["backend"], line["implementation"], *times, line.get("error", "")]


if __name__ == "__main__":
    typer.run(main)
