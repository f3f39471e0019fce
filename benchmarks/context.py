"""How long a sequence can be trained in so much memory?  ``python -m benchmarks.context --shape 8b --memory-gib 24``

One row of growing length, each attempt a process of its own whose allocations fail over the limit: doubled until one fails,
then bisected. With --layers a stack of fewer layers is trained, and the bytes that the others would hold (weights, adapters,
optimizer) are taken off the limit; what checkpointing keeps of them on the device is not: use it where that is offloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.contenders import Entry, parse_entries
from benchmarks.launch import default_dtype, run_entry
from benchmarks.shapes import shape_spec
from benchmarks.work import Work, layer_bytes


def longest(entry: Entry, work: Work, scratch: Path, *, start: int, most: int, grain: int, timeout: float) -> dict[str, Any]:
    """The entry's longest length that fits, to within `grain`, with every attempt."""
    folder = ensure_checkpoint(work.shape, scratch)
    attempts: list[dict[str, Any]] = []

    def fits(length: int) -> bool:
        result = run_entry(entry, work.at_length(length), folder, scratch, timeout=timeout)
        attempts.append({"length": length, **result})
        state = result.get("error") or f"{result['times_s'][-1]:.1f} s, {report.gib(result['peak_bytes'])} GiB"
        report.console.print(f"  {entry.label}: {length} tokens: {state}", markup=False)
        return "error" not in result

    good, bad, length = 0, most + 1, start
    while good < length <= most and bad > most:
        if fits(length):
            good, length = length, min(length * 2, most)
        else:
            bad = length
    while good and bad <= most and bad - good > grain:
        middle = (good + bad) // 2 // grain * grain
        if middle in (good, bad):
            break
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    about = {"label": entry.label, "contender": entry.contender.name, "longest": good, "attempts": attempts}
    return about if good else about | {"error": attempts[-1]["error"]}


def main(
    shape: Annotated[str, typer.Option(help="tiny, 1b or 8b")] = "tiny",
    memory_gib: Annotated[float, typer.Option(help="the device that is played")] = 24.0,
    contenders: Annotated[str, typer.Option(help="comma-separated")] = "jaxsloth-torch,jaxsloth-jax,unsloth",
    layers: Annotated[int | None, typer.Option(help="train so many layers; the others' bytes come off the limit")] = None,
    start: Annotated[int, typer.Option(help="first length tried")] = 16384,
    most: Annotated[int, typer.Option(help="longest length tried")] = 1 << 20,
    grain: Annotated[int, typer.Option(help="how exactly the length is found")] = 4096,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; a chart goes beside it as .png")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one attempt may take")] = 300.0,
) -> None:
    """Finds every contender's longest context under a memory limit."""
    limit = int(memory_gib * 2**30)
    work = Work(shape, 1, start, dtype=dtype or default_dtype(), warmup=0, steps=1)  # type: ignore[arg-type]
    if layers is not None:
        limit -= (len(shape_spec(shape).layers) - layers) * layer_bytes(work)
    results = []
    for entry in parse_entries(contenders):
        mode = entry.checkpointing or entry.contender.checkpointing[1]
        named = shape if layers is None else f"{shape}-{layers}"
        own = work.of(mode, entry.options).within(named, limit)
        results.append(longest(entry, own, scratch_folder(scratch), start=start, most=most, grain=grain, timeout=timeout))
    title = f"longest context, {shape}, {memory_gib:g} GiB" + ("" if layers is None else f", {layers} layers run")
    lines = [(r["label"], str(r["longest"]) if "error" not in r else "[red]none[/]") for r in results]
    report.print_table(title, ("contender", "tokens"), lines)
    report.print_failures(results)
    if output is not None:
        rows = {title: {"work": work.to_json(), "results": results}}
        report.save(output, "context", rows)
        report.chart(output.with_suffix(".png"), rows, "longest", "tokens")


if __name__ == "__main__":
    typer.run(main)
