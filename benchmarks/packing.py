"""What does packing short documents gain?  ``python -m benchmarks.packing --shape 8b``

Whole epochs over documents of about 180 tokens: packed into full rows, and one a row, padded to the batch's longest; real
tokens (no padding) a second. The first epoch, which compiles, has learning rate 0: its loss must be the same both ways, or
packed documents have seen each other.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.contenders import parse_entries
from benchmarks.launch import default_dtype, run_entry
from benchmarks.work import Work


def run(work: Work, padded_batch: int, contenders: str, scratch: Path, timeout: float) -> list[dict[str, Any]]:
    """Each contender's padded and packed result, in that order; the packed one has "gain" and "loss_difference"."""
    folder = ensure_checkpoint(work.shape, scratch)
    results = []
    for entry in parse_entries(contenders):
        mode = entry.checkpointing or entry.contender.checkpointing[0]
        pair = []
        for packing in (False, True):
            own = replace(work.of(mode, entry.options), packing=packing, batch=work.batch if packing else padded_batch)
            result = run_entry(entry, own, folder, scratch, timeout=timeout)
            result["label"] = f"{entry.label} {'packed' if packing else 'padded'}"
            if "error" not in result:
                result["median_s"] = statistics.median(result["times_s"][work.warmup :])
                result["tokens_per_s"] = result["tokens"] / result["median_s"]
            pair.append(result)
        padded, packed = pair
        if "error" not in padded and "error" not in packed:
            packed["gain"] = packed["tokens_per_s"] / padded["tokens_per_s"]
            packed["loss_difference"] = abs(packed["losses"][0] - padded["losses"][0]) / padded["losses"][0]
        results += pair
    return results


def main(
    shape: Annotated[str, typer.Option(help="tiny, 1b or 8b")] = "tiny",
    documents: Annotated[int, typer.Option(help="documents an epoch")] = 512,
    batch: Annotated[int, typer.Option(help="packed rows a step")] = 4,
    length: Annotated[int, typer.Option(help="tokens of a packed row")] = 2048,
    padded_batch: Annotated[int, typer.Option(help="documents a step where they are padded")] = 16,
    contenders: Annotated[str, typer.Option(help="comma-separated")] = "jaxsloth-torch,jaxsloth-jax",
    quantization: Annotated[str, typer.Option(help="nf4 or none")] = "nf4",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; a chart goes beside it as .png")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take for one way")] = 400.0,
) -> None:
    """Times epochs over short documents, padded and packed."""
    work = Work(shape, batch, length, quantization, dtype or default_dtype(), warmup=1, steps=1)  # type: ignore[arg-type]
    work = replace(work, documents=documents)
    results = run(work, padded_batch, contenders, scratch_folder(scratch), timeout)
    lines = []
    for r in results:
        if "error" in r:
            lines.append((r["label"], "[red]failed[/]"))
            continue
        numbers = (
            f"{r['tokens_per_s']:.0f}",
            f"{r['median_s']:.2f}",
            str(r["steps"]),
            str(r["shapes"]),
            report.gib(r["peak_bytes"]),
        )
        same = (f"{r['gain']:.2f}", f"{r['loss_difference']:.1e}") if "gain" in r else ("", "")
        lines.append((r["label"], *numbers, f"{r['losses'][0]:.5f}", *same))
    columns = ("contender", "real tokens/s", "s an epoch", "steps", "shapes", "peak GiB", "loss", "gain", "Δ loss")
    title = f"packing {shape}, {quantization}: {documents} documents, {batch}×{length} packed, {padded_batch} a batch padded"
    report.print_table(title, columns, lines)
    report.print_failures(results)
    if output is not None:
        rows = {title: {"work": work.to_json(), "results": results}}
        report.save(output, "packing", rows)
        report.chart(output.with_suffix(".png"), rows, "tokens_per_s", "real tokens/s")


if __name__ == "__main__":
    typer.run(main)
