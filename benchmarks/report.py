"""What a benchmark leaves behind: a table, a JSON file with the environment, and a bar chart."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.agreement import BAR
from benchmarks.launch import ROOT, nvidia_smi
from benchmarks.work import PEAK_FLOPS, Work, counted_flops

PACKAGES = (
    "jaxsloth",
    "torch",
    "triton",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "unsloth",
    "unsloth_zoo",
    "xformers",
    "numpy",
)
COLOURS = {
    "jaxsloth-torch": "#1b6ca8",
    "jaxsloth-jax": "#2a9d5c",
    "module-torch": "#7fb2d6",
    "module-jax": "#8fd3ac",
    "hf": "#b0b0b0",
    "unsloth": "#d98e04",
    "floor": "#444444",
}
console = Console(width=170)


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that a measurement is of."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": nvidia_smi("name"),
        "driver": nvidia_smi("driver_version"),
        "gpu_memory": nvidia_smi("memory.total"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def summarize(results: Sequence[dict[str, Any]], work: Work, recompute: bool) -> None:
    """Adds to each result of a training row its median, its speed, and its ratios to the limit and to the peers, in place."""
    flops = counted_flops(work)
    limit = (flops["step"] + (flops["recompute"] if recompute else 0.0)) / PEAK_FLOPS
    for result in results:
        if "error" in result:
            continue
        timed = result["times_s"][work.warmup :]
        median = statistics.median(timed)
        result |= {"median_s": median, "min_s": min(timed), "max_s": max(timed), "first_step_s": result["times_s"][0]}
        result |= {"tokens_per_s": work.batch * work.length / median, "limit_s": limit, "of_limit": limit / median}
    for result in results:
        if "error" not in result:
            add_ratios(result, results, "median_s")


def add_ratios(result: dict[str, Any], results: Sequence[dict[str, Any]], key: str) -> None:
    """How many times faster than each peer, and than the floor of bare products: their seconds over its own."""
    for peer in ("unsloth", "hf", "floor"):
        times = [other[key] for other in results if other["contender"] == peer and "error" not in other]
        if times:
            result[f"times_{peer}"] = times[0] / result[key]


def print_training(title: str, results: Sequence[dict[str, Any]], work: Work) -> None:
    """The row's table, the losses of memorising its batch, and whose gradients differ."""
    columns = ("contender", "mode", "median ms", "min–max", "tokens/s", "peak GiB", "first s", "load s", "of limit")
    rows = []
    for r in results:
        if "error" in r:
            rows.append((r["label"], r["checkpointing"], "[red]failed[/]"))
            continue
        span = f"{r['min_s'] * 1e3:.1f}–{r['max_s'] * 1e3:.1f}"
        cells = [r["label"], r["checkpointing"], f"{r['median_s'] * 1e3:.1f}", span, f"{r['tokens_per_s']:.0f}"]
        cells += [gib(r["peak_bytes"]), f"{r['first_step_s']:.1f}", f"{r['load_s']:.1f}", f"{r['of_limit']:.2f}"]
        deltas = [f"{_difference(r, kind):.1e}" if r.get("differences") else "" for kind in ("layer", "tensor")]
        rows.append((*cells, times(r, "unsloth"), times(r, "hf"), times(r, "floor"), *deltas))
    print_table(title, (*columns, "×Unsloth", "×HF", "×floor", "Δ layer", "Δ tensor"), rows)
    print_failures(results)
    for r in results:
        if r.get("losses"):
            console.print(f"  {r['label']}: losses {' '.join(f'{loss:.4f}' for loss in r['losses'][:8])}")
        if _difference(r, "layer") > BAR:
            console.print(f"  [bold red]{r['label']}: a layer's gradients differ by more than {BAR}[/]")
    limit = next((r["limit_s"] for r in results if "error" not in r), None)
    if limit is not None:
        console.print(f"  limit: {limit * 1e3:.1f} ms, the counted FLOPs at {PEAK_FLOPS / 1e12:.0f} TFLOP/s")


def _difference(result: dict[str, Any], kind: str) -> float:
    """The largest of a result's differences from the others (benchmarks.agreement)."""
    return max((found[kind][0] for found in result.get("differences", {}).values()), default=0.0)


def print_failures(results: Sequence[dict[str, Any]]) -> None:
    for result in results:
        if "error" in result:
            console.print(f"  {result['label']} failed: {result['error']}", style="red", markup=False)


def gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def times(result: dict[str, Any], peer: str) -> str:
    return f"{result[f'times_{peer}']:.2f}" if f"times_{peer}" in result else ""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in ("contender", "mode", "kernel") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_kernels(results: Sequence[dict[str, Any]]) -> None:
    """The kernels that ran, by total time."""
    for result in results:
        kernels = result.get("kernels")
        if isinstance(kernels, dict):
            console.print(f"{result['label']}: no trace: {kernels['error']}")
        elif kernels is not None:
            rows = [(kernel["name"], str(kernel["calls"]), f"{kernel['ms']:.2f}") for kernel in kernels]
            print_table(f"{result['label']}: kernels of one run", ("kernel", "calls", "ms"), rows)


def save(output: Path, benchmark: str, rows: dict[str, Any]) -> None:
    """Writes {benchmark, environment, rows} as JSON; rows of an earlier call to the same file are kept beside the new ones."""
    old = json.loads(output.read_text(encoding="utf-8")).get("rows", {}) if output.is_file() else {}
    whole = {"benchmark": benchmark, "environment": environment(), "rows": old | rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def chart(output: Path, rows: dict[str, Any], key: str, label: str) -> None:
    """A panel a row, a bar a contender that ran, of the results' `key`."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    panels = {name: [r for r in row["results"] if key in r] for name, row in rows.items()}
    panels = {name: results for name, results in panels.items() if results}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels) + 0.6, 3.6), squeeze=False, layout="constrained")
    for axis, (name, results) in zip(axes[0], panels.items(), strict=True):
        labels = [result["label"] for result in results]
        bars = axis.bar(labels, [r[key] for r in results], color=[COLOURS.get(r["contender"], "#888888") for r in results])
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axis.set_title(name, fontsize=10)
        axis.tick_params(axis="x", labelrotation=30, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(label)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    plt.close(figure)
