"""How fast are tokens generated?  ``python -m benchmarks.decode --shape 8b``

Greedy decoding of exactly --new tokens after random prompts, each contender through its users' own call:
jaxsloth.generation.generate, transformers' and Unsloth's model.generate. Whole calls are timed, prefill included, after one
warm-up call of the same sizes.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.contenders import DEFAULT, parse_entries
from benchmarks.launch import default_dtype, run_entry
from benchmarks.work import Work, weight_bytes

BANDWIDTH = 4.3e12  # bytes/s that one H200's memory copies, read and written together


def run(work: Work, contenders: str, scratch: Path, *, profile: bool, timeout: float) -> list[dict[str, Any]]:
    """Every contender's median seconds a call and tokens/s over all rows."""
    folder = ensure_checkpoint(work.shape, scratch)
    results = []
    for entry in parse_entries(contenders):
        mode = entry.checkpointing or entry.contender.checkpointing[0]
        result = run_entry(entry, work.of(mode, entry.options), folder, scratch, profile=profile, timeout=timeout)
        if "error" not in result:
            timed = result["times_s"][work.warmup :]
            median = statistics.median(timed)
            result |= {"median_s": median, "min_s": min(timed), "max_s": max(timed)}
            result["tokens_per_s"] = work.batch * work.new_tokens / median
        results.append(result)
    for result in results:
        if "error" not in result:
            report.add_ratios(result, results, "median_s")
    return results


def main(
    shape: Annotated[str, typer.Option(help="tiny, 1b or 8b")] = "tiny",
    batches: Annotated[str, typer.Option(help="comma-separated batch sizes")] = "1,8",
    prompt: Annotated[int, typer.Option(help="tokens of each prompt")] = 128,
    new: Annotated[int, typer.Option(help="tokens generated after it")] = 256,
    contenders: Annotated[str, typer.Option(help="comma-separated")] = DEFAULT,
    quantization: Annotated[str, typer.Option(help="nf4 or none")] = "nf4",
    adapters: Annotated[bool, typer.Option(help="with LoRA active; default: the base alone")] = False,
    repeat: Annotated[int, typer.Option(help="timed calls")] = 2,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    profile: Annotated[bool, typer.Option(help="trace one more call and print the kernels that ran")] = False,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file; a chart goes beside it as .png")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take")] = 300.0,
) -> None:
    """Times greedy decoding of every contender."""
    rows: dict[str, Any] = {}
    for batch in (int(size) for size in batches.split(",")):
        work = Work(shape, batch, prompt, quantization, dtype or default_dtype(), warmup=1, steps=repeat)  # type: ignore[arg-type]
        work = replace(work, lora=adapters, new_tokens=new)
        results = run(work, contenders, scratch_folder(scratch), profile=profile, timeout=timeout)
        title = f"decode {shape}, {quantization}, batch {batch}, {prompt} + {new} tokens"
        rows[title] = {"work": work.to_json(), "results": results}
        columns = ("contender", "tokens/s", "s a call", "min–max", "first call s", "load s", "peak GiB", "×Unsloth", "×HF")
        lines = []
        for r in results:
            if "error" in r:
                lines.append((r["label"], "[red]failed[/]"))
                continue
            cells = [r["label"], f"{r['tokens_per_s']:.0f}", f"{r['median_s']:.2f}", f"{r['min_s']:.2f}–{r['max_s']:.2f}"]
            cells += [f"{r['times_s'][0]:.1f}", f"{r['load_s']:.1f}", report.gib(r["peak_bytes"])]
            lines.append((*cells, report.times(r, "unsloth"), report.times(r, "hf")))
        report.print_table(title, columns, lines)
        report.print_failures(results)
        limit = batch * BANDWIDTH / weight_bytes(work)
        report.console.print(f"  limit: {limit:.0f} tok/s, reading the weights once a token at {BANDWIDTH / 1e12} TB/s")
        if profile:
            report.print_kernels(results)
        if output is not None:
            report.save(output, "decode", rows)
            report.chart(output.with_suffix(".png"), rows, "tokens_per_s", "tokens/s")


if __name__ == "__main__":
    typer.run(main)
