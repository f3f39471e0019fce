"""What does the torch module cost over the native step?  ``python -m benchmarks.facade --shape 8b --batch 2 --length 2048``

The native step is the backend's own, optimizer included. The module's is what a Hugging Face trainer runs: the forward under
autocast, ``loss.backward()``, torch's AdamW on PEFT's adapters, ``zero_grad``. Every contender has a process of its own, one
after another on one GPU, and the same weights, tokens and adapters; first gradients are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks import report
from benchmarks.checkpoint import scratch_folder
from benchmarks.launch import default_dtype
from benchmarks.rows import Row
from benchmarks.step import run_row
from benchmarks.work import Work

PAIRS = {"module-torch": "jaxsloth-torch", "module-jax": "jaxsloth-jax"}
BAR = 1.05  # what the module's step may take of the native one


def add_costs(results: Sequence[dict[str, Any]]) -> None:
    """Adds to each module's result the native step's share of it, in place: its seconds over the native contender's."""
    natives = {result["contender"]: result["median_s"] for result in results if "median_s" in result}
    for result in results:
        native = natives.get(PAIRS.get(result["contender"], ""))
        if "median_s" in result and native is not None:
            result["of_native"] = result["median_s"] / native


def print_costs(title: str, results: Sequence[dict[str, Any]]) -> None:
    rows = []
    for r in results:
        if "error" in r:
            rows.append((r["label"], r["checkpointing"], "[red]failed[/]"))
            continue
        span = f"{r['min_s'] * 1e3:.1f}–{r['max_s'] * 1e3:.1f}"
        cost = f"{r['of_native']:.3f}" if "of_native" in r else ""
        verdict = "" if not cost else "yes" if r["of_native"] <= BAR else "[red]no[/]"
        cells = (f"{r['median_s'] * 1e3:.1f}", span, report.gib(r["peak_bytes"]), f"{r['first_step_s']:.1f}")
        rows.append((r["label"], r["checkpointing"], *cells, cost, verdict, f"{r['losses'][-1]:.4f}"))
    columns = ("contender", "mode", "median ms", "min–max", "peak GiB", "first s", "×native", f"≤ {BAR}", "last loss")
    report.print_table(title, columns, rows)
    report.print_failures(results)


def main(
    shape: Annotated[str, typer.Option(help="tiny, 1b or 8b")] = "tiny",
    layers: Annotated[int | None, typer.Option(help="fewer layers than the shape has")] = None,
    batch: int = 2,
    length: int = 64,
    quantization: Annotated[Literal["nf4", "none"], typer.Option()] = "nf4",
    checkpointing: Annotated[str, typer.Option(help="gradient_checkpointing of all contenders")] = "none",
    backends: Annotated[str, typer.Option(help="comma-separated")] = "torch,jax",
    steps: int = 8,
    warmup: int = 3,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    profile: Annotated[bool, typer.Option(help="trace one more step and print the kernels that ran")] = False,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; a chart goes beside it as .png")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take")] = 400.0,
) -> None:
    """Times native and module steps of the backends on the same work."""
    whole = shape if layers is None else f"{shape}-{layers}"
    work = Work(whole, batch, length, quantization, dtype or default_dtype(), warmup=warmup, steps=steps)  # type: ignore[arg-type]
    entries = ",".join(
        f"{name}:{checkpointing}" for one in backends.split(",") for name in (f"jaxsloth-{one}", f"module-{one}")
    )
    row = Row(f"facade-{whole}-{batch}x{length}-{checkpointing}", work, checkpointing == "full", entries)
    found = run_row(row, None, scratch_folder(scratch), profile=profile, timeout=timeout)
    add_costs(found["results"])
    print_costs(row.title(), found["results"])
    if profile:
        report.print_kernels(found["results"])
    if output is not None:
        report.save(output, "facade", {row.name: found})
        report.chart(output.with_suffix(".png"), {row.name: found}, "tokens_per_s", "tokens/s")


if __name__ == "__main__":
    typer.run(main)
