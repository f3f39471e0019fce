"""Does training with products in 8 bits learn as much?  ``python -m benchmarks.fp8_quality --output fp8-quality.json``

QLoRA of the real SmolLM2-135M-Instruct on GSM8K, the same rows in the same order: exact, exact from an adapter whose every
weight is moved by one unit in the last place (how far rounding alone drives two runs apart), and with ``compute: fp8``. Every
adapter is judged by the exact model's held-out loss, before and after. The bar: fp8 improves it by the same amount within 2 %.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.parity_l5 import HELD_OUT_BAR
from jaxsloth.backend import Model, OptimizerOptions
from jaxsloth.convert.checkpoint import open_checkpoint, resolve_path
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity.subjects import GSM8K, SMOLLM2
from jaxsloth.recipe import make_recipe
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.training.records import RunPlan
from jaxsloth.training.run import build_model, make_plan
from jaxsloth.training.schedule import learning_rate

RUNS = {"exact": ("exact", False), "exact, one ulp away": ("exact", True), "fp8": ("fp8", False)}


def plan_of(steps: int, batch: int, length: int, quantization: str, folder: str) -> RunPlan:
    """The exact run's plan; nothing is written to `folder`."""
    values = {
        "model": SMOLLM2,
        "backend": "torch",
        "dtype": "bfloat16",
        "quantization": quantization,
        "implementations": {"train_pass": "fused"},
        "lora": {"r": 16, "alpha": 16},
        "data": {
            "path": GSM8K,
            "columns": {"prompt": "question", "completion": "answer"},
            "response_only": False,
            "max_length": length,
            "truncation": True,
            "validation_fraction": 0.1,
        },
        "optimizer": {"learning_rate": 5e-4},
        "schedule": {"kind": "cosine", "warmup_steps": 10},
        "steps": steps,
        "batch_size": batch,
        "evaluation": {"batch_size": batch},
        "checkpoints": {"output": f"{folder}/run"},
        "seed": 7,
    }
    return make_plan(make_recipe(values), open_checkpoint(resolve_path(SMOLLM2)))


def held_out_loss(model: Model, plan: RunPlan, most: int | None) -> float:
    step, total, count = model.eval_step(), 0.0, 0
    for batch in plan.held_out[:most]:
        loss, tokens = step(batch)
        total, count = total + float(loss), count + tokens
    return total / count


def train(plan: RunPlan, moved: bool, most: int | None) -> dict[str, Any]:
    """The loss of every step, and the held-out loss before and after as the run's own products give it."""
    opened = open_checkpoint(resolve_path(plan.recipe.model))
    model = build_model(plan, opened)
    if moved:
        values = initial_adapters(plan.spec, "kaiming", plan.recipe.seed, model.base_tensor)
        model.load_trainable({n: np.nextafter(v, np.float32(np.inf), dtype=np.float32) for n, v in values.items()})
    before, losses = held_out_loss(model, plan, most), []
    step_function, optimizer = model.step(CausalLoss(), OptimizerOptions()), plan.recipe.optimizer
    for step in range(plan.total_steps):
        rate = learning_rate(step, plan.total_steps, optimizer.learning_rate, plan.recipe.schedule)
        losses.append(step_function(plan.step_batches.batch(step), learning_rate=rate, step=step, seed=0).floats()[0])
    return {"losses": losses, "before": before, "after": held_out_loss(model, plan, most), "adapter": model.trainable()}


def judge(runs: dict[str, dict[str, Any]], before: float) -> dict[str, Any]:
    """Improvements by the exact model's loss, each beside that of the first run."""
    gains = {name: before - run["judged"] for name, run in runs.items()}
    reference = gains["exact"]
    differences = {name: (gain - reference) / reference for name, gain in gains.items()}
    return {
        "before": before,
        "improvement": gains,
        "relative_difference": differences,
        "passed": bool(abs(differences["fp8"]) <= HELD_OUT_BAR),
    }


def show(runs: dict[str, dict[str, Any]], verdict: dict[str, Any]) -> None:
    table = Table("run", "loss of the last 20 steps", "held out, own products", "held out, exact", "improvement", "difference")
    for name, run in runs.items():
        numbers = (np.mean(run["losses"][-20:]), run["after"], run["judged"], verdict["improvement"][name])
        table.add_row(name, *(f"{number:.4f}" for number in numbers), f"{verdict['relative_difference'][name]:+.2%}")
    console = Console()
    console.print(f"held out before training: {verdict['before']:.4f}")
    console.print(table)
    console.print("passed" if verdict["passed"] else f"[red]over the bar of {HELD_OUT_BAR:.0%}[/]")


def main(
    steps: Annotated[int, typer.Option(min=2, help="the first one's learning rate is 0")] = 200,
    batch: int = 8,
    length: Annotated[int, typer.Option(help="tokens at which a row is cut")] = 384,
    quantization: Annotated[str, typer.Option(help="nf4-nested, nf4 or none")] = "nf4-nested",
    held_out: Annotated[int | None, typer.Option(help="held-out batches; default: all")] = None,
    output: Annotated[Path | None, typer.Option(help="where the runs and the verdict go, as JSON")] = None,
) -> None:
    """Trains three times and compares what was learnt."""
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(steps, batch, length, quantization, folder)
        plans = {name: replace(plan, recipe=plan.recipe.model_copy(update={"compute": name})) for name in ("exact", "fp8")}
        for name, (compute, moved) in RUNS.items():
            runs[name] = train(plans[compute], moved, held_out)
        exact = build_model(plan, open_checkpoint(resolve_path(SMOLLM2)))
        for run in runs.values():
            exact.load_trainable(run.pop("adapter"))
            run["judged"] = held_out_loss(exact, plan, held_out)
    verdict = judge(runs, runs["exact"]["before"])
    show(runs, verdict)
    if output is not None:
        output.write_text(json.dumps({"runs": runs, "verdict": verdict}, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if verdict["passed"] else 1)


if __name__ == "__main__":
    typer.run(main)
