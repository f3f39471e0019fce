"""Runs the ladder, prints every number beside its bar, and says whether all passed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxsloth import terminal
from jaxsloth.extras import require
from jaxsloth.parity.measure import Measurement

JUDGES = ("bitsandbytes", "transformers", "peft", "trl", "torch", "jax", "flax", "optax", "numpy")
TITLES = {
    "L0": "NF4 against bitsandbytes",
    "L1": "ops against their float64 references",
    "L2": "logits against transformers",
    "L3": "LoRA gradients against PEFT",
    "L4": "50 training steps: torch, JAX, TRL",
    "L6": "adapters change hands",
}


def ladder(model: str) -> Iterator[Measurement]:
    """Every measurement, rung by rung, as soon as it is made. L5 needs a GPU and is a benchmark's, not this command's."""
    from jaxsloth.parity import l0_nf4, l1_ops, l2_logits, l3_gradients, l4_training, l6_adapters
    from jaxsloth.parity.subjects import Subjects

    subjects = Subjects(model)
    yield from l0_nf4.measure(subjects)
    yield from l1_ops.measure()
    yield from l2_logits.measure(subjects)
    yield from l3_gradients.measure(subjects)
    runs = {"torch": l4_training.train(subjects, "torch"), "jax": l4_training.train(subjects, "jax")}
    yield from l4_training.measure(subjects, {**runs, "trl": l4_training.train_trl(subjects)})
    yield from l6_adapters.measure(subjects, {name: run.adapter for name, run in runs.items()})


def judge_versions() -> dict[str, str]:
    """The installed versions of everything that judges or is judged; "absent" where a package is not installed."""

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    return {package: installed(package) for package in JUDGES}


def report(measurements: Iterable[Measurement], console: Console) -> list[Measurement]:
    """Prints each rung's table when the rung is complete; returns everything measured."""
    done: list[Measurement] = []
    pending: list[Measurement] = []
    for measurement in measurements:
        if pending and pending[0].rung != measurement.rung:
            console.print(_table(pending))
            pending = []
        pending.append(measurement)
        done.append(measurement)
    if pending:
        console.print(_table(pending))
    return done


def run(model: str | None = None, json_file: Path | None = None, console: Console | None = None) -> bool:
    """Climbs the whole ladder on a checkpoint (default: SmolLM2-135M-Instruct) and returns whether every bar was met.

    Args:
        model: a path, ``package:NAME/file`` or a Hugging Face name; GSM8K's rows are the data in any case.
        json_file: where to write everything measured, with versions and times; written even when a bar is missed.
    """
    require("parity", "the parity ladder")
    from jaxsloth.parity.subjects import SMOLLM2

    console = console or terminal.console()
    name, start = model or SMOLLM2, time.perf_counter()
    console.print(f"Parity of {name}\nJudges: " + ", ".join(f"{k} {v}" for k, v in judge_versions().items()))
    measured = report(ladder(name), console)
    missed = [m for m in measured if not m.passed]
    seconds = time.perf_counter() - start
    if json_file is not None:
        result = {
            "model": name,
            "versions": judge_versions(),
            "seconds": round(seconds, 1),
            "passed": not missed,
            "measurements": [{**asdict(m), "passed": m.passed} for m in measured],
        }
        temporary = json_file.with_name(f".{json_file.name}.tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(json_file)
    verdict = f"{len(missed)} of {len(measured)} bars missed" if missed else f"all {len(measured)} bars met"
    console.print(f"{verdict} in {seconds:.0f} s", style="red" if missed else "green")
    return not missed


def _table(measurements: list[Measurement]) -> Table:
    rung = measurements[0].rung
    table = Table(title=f"{rung}: {TITLES[rung]}", title_justify="left", expand=False)
    for column in ("what", "measured", "bar", "", "note"):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left", overflow="fold")
    for m in measurements:
        sign = "≤" if m.sense == "at most" else ">"
        verdict = "[green]ok[/]" if m.passed else "[red]MISSED[/]"
        table.add_row(m.what, f"{m.value:.3g}", f"{sign} {m.bar:g}", verdict, m.note)
    return table
