"""How long is a training step, and how much memory does it take?  ``python -m benchmarks.step --row 8b-fast``

LoRA r=16 on all seven projections over random weights of a real shape, labels = inputs, AdamW, bf16. Every contender has a
process of its own, one after another on one GPU, and the same weights, tokens and adapters; their gradients are compared, so
that the speeds are of the same work. --shape instead of --row measures any other work, also on a CPU (``--shape tiny``).
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.agreement import compare
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.contenders import DEFAULT, parse_entries
from benchmarks.launch import Started, default_dtype, start_entry
from benchmarks.rows import ROWS, Row
from benchmarks.work import Work


def run_row(row: Row, contenders: str | None, scratch: Path, *, profile: bool, timeout: float) -> dict[str, Any]:
    """The row's results: what every contender measured, with ratios, and the gradients' differences."""
    folder = ensure_checkpoint(row.work.shape, scratch)
    results, gradients = [], {}
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        entries = parse_entries(contenders or row.contenders)
        files = [Path(temporary) / f"{place}.npz" for place in range(len(entries))]

        def start(place: int) -> Started:
            entry = entries[place]
            return start_entry(entry, row.work_of(entry), folder, scratch, gradients=files[place], profile=profile)

        # A contender imports while the one before it loads and compiles; what is timed is alone, and the GPU has one at a time.
        coming: Started | None = start(0)
        for place, entry in enumerate(entries):
            assert coming is not None
            current, coming = coming, start(place + 1) if place + 1 < len(entries) else None
            result = current.finish(timeout, quiet=coming)
            results.append(result)
            if "error" not in result and files[place].is_file():
                gradients[entry.label] = files[place]
        # What rounds on purpose, as fp8 does, is no measure of the others.
        differences = compare(gradients, {entry.label for entry in entries if "compute" not in entry.options})
    for result in results:
        result["differences"] = differences.get(result["label"], {})
    report.summarize(results, row.work, row.recompute)
    return {"title": row.title(), "work": row.work.to_json(), "results": results}


def chosen_rows(name: str | None, work: Work, recompute: bool, warmup: int | None) -> list[Row]:
    """The named row, all of them, or one made of `work`."""
    if name is None:
        return [Row("step", work, recompute)]
    if name != "all" and name not in ROWS:
        raise typer.BadParameter(f"--row must be one of {[*ROWS, 'all']}, got {name!r}")
    picked = list(ROWS.values()) if name == "all" else [ROWS[name]]
    own = {"dtype": work.dtype, "steps": work.steps} | ({} if warmup is None else {"warmup": warmup})
    return [replace(row, work=replace(row.work, **own)) for row in picked]


def main(
    row: Annotated[str | None, typer.Option(help=f"a preset: {', '.join(ROWS)} or all")] = None,
    contenders: Annotated[
        str | None,
        typer.Option(help=f"comma-separated name[:checkpointing][:field=value], e.g. jaxsloth-torch:full; default {DEFAULT}"),
    ] = None,
    shape: Annotated[str, typer.Option(help="without --row: tiny, 1b or 8b, or with fewer layers: 8b-4")] = "tiny",
    batch: int = 2,
    length: int = 64,
    quantization: Annotated[str, typer.Option(help="nf4 or none")] = "nf4",
    recompute: Annotated[bool, typer.Option(help="without --row: each contender's lowest-memory mode")] = False,
    steps: int = 8,
    warmup: Annotated[int | None, typer.Option(help="default: the row's own, or 3")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    profile: Annotated[bool, typer.Option(help="trace one more step and print the kernels that ran")] = False,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; a chart goes beside it as .png")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take")] = 400.0,
) -> None:
    """Times a training step of every contender on the same work."""
    root = scratch_folder(scratch)
    dtype = dtype or default_dtype()
    work = Work(shape, batch, length, quantization, dtype, warmup=3 if warmup is None else warmup, steps=steps)  # type: ignore[arg-type]
    rows: dict[str, Any] = {}
    for each in chosen_rows(row, work, recompute, warmup):
        rows[each.name] = run_row(each, contenders, root, profile=profile, timeout=timeout)
        report.print_training(each.title(), rows[each.name]["results"], each.work)
        if profile:
            report.print_kernels(rows[each.name]["results"])
        if output is not None:  # after every row: a run that is cut off keeps what it had
            report.save(output, "step", rows)
            report.chart(output.with_suffix(".png"), rows, "tokens_per_s", "tokens/s")


if __name__ == "__main__":
    typer.run(main)
