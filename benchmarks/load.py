"""How long until training runs?  ``python -m benchmarks.load --shape 8b``

Seconds from a bf16 checkpoint (in memory, where there is room) to the model on the device, quantized and with adapters; and
from the start of the process to the end of its first step, imports and compilation included. Each contender starts --repeat
times: what it caches on disk helps it from the second time on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.contenders import DEFAULT, parse_entries
from benchmarks.launch import default_dtype, run_entry
from benchmarks.work import Work


def run(work: Work, contenders: str, repeat: int, scratch: Path, timeout: float) -> list[dict[str, Any]]:
    """A result a contender and start, labelled with the start's number from 1."""
    folder = ensure_checkpoint(work.shape, scratch)
    results = []
    for entry in parse_entries(contenders):
        mode = entry.checkpointing or entry.contender.checkpointing[0]
        for start in range(1, repeat + 1):
            result = run_entry(entry, work.of(mode, entry.options), folder, scratch, timeout=timeout)
            result["label"] = f"{entry.label} #{start}"
            if "error" not in result:
                result["first_step_s"] = result["times_s"][0]
            results.append(result)
            if "error" in result:
                break
    return results


def main(
    shape: Annotated[str, typer.Option(help="tiny, 1b or 8b")] = "tiny",
    contenders: Annotated[str, typer.Option(help="comma-separated")] = DEFAULT,
    quantization: Annotated[str, typer.Option(help="nf4 or none")] = "nf4",
    batch: int = 4,
    length: int = 512,
    repeat: Annotated[int, typer.Option(help="starts of each contender")] = 2,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; a chart goes beside it as .png")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one start may take")] = 300.0,
) -> None:
    """Times loading, and the way to the first step."""
    work = Work(shape, batch, length, quantization, dtype or default_dtype(), warmup=0, steps=1)  # type: ignore[arg-type]
    results = run(work, contenders, repeat, scratch_folder(scratch), timeout)
    lines = []
    for r in results:
        if "error" in r:
            lines.append((r["label"], "[red]failed[/]"))
            continue
        seconds = (r["import_s"], r["load_s"], r["first_step_s"], r["start_to_first_step_s"])
        lines.append((r["label"], *(f"{value:.1f}" for value in seconds), report.gib(r["peak_bytes"])))
    columns = ("contender", "start + import s", "checkpoint to device s", "first step s", "start to first step s", "peak GiB")
    title = f"load {shape}, {quantization}, first step of {batch}×{length}"
    report.print_table(title, columns, lines)
    report.print_failures(results)
    if output is not None:
        rows = {title: {"work": work.to_json(), "results": results}}
        report.save(output, "load", rows)
        report.chart(output.with_suffix(".png"), rows, "start_to_first_step_s", "process start to first step, s")


if __name__ == "__main__":
    typer.run(main)
