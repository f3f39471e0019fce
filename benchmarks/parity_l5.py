"""Rung L5 of the parity ladder: do torch and JAX train alike in NF4 and bfloat16?  ``python -m benchmarks.parity_l5``

200 steps of LoRA on a random model of a real shape over text of a Markov chain, on each backend, and once more on torch from an
adapter whose every weight is moved by one unit in the last place: how far rounding alone drives two runs apart. The bar: the
largest gap between the backends is at most twice that band's, and the held-out loss improves by the same amount within 2 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.peers.own import step_batch

STEPS, BATCH, LENGTH, HELD_OUT = 200, 4, 512, 4
STATES, SUCCESSORS = 2048, (0.6, 0.2, 0.15, 0.05)
LEARNING_RATE, WARMUP = 5e-4, 10
STAGE = 20  # steps that are averaged before runs are compared
RUNS = {"torch": ("torch", False), "torch, one ulp away": ("torch", True), "jax": ("jax", False)}
BAND, HELD_OUT_BAR = 2.0, 0.02


def text(vocab: int, count: int, seed: int) -> np.ndarray:
    """int32 ``[count, BATCH, LENGTH]`` of a Markov chain whose states are tokens, each with four successors."""
    chain = np.random.Generator(np.random.Philox(7))
    tokens = chain.choice(vocab, STATES, replace=False)
    following = chain.integers(0, STATES, (STATES, len(SUCCESSORS)))
    generator = np.random.Generator(np.random.Philox(seed))
    state = generator.integers(0, STATES, (count, BATCH))
    found = np.empty((count, BATCH, LENGTH), np.int32)
    for place in range(LENGTH):
        found[..., place] = tokens[state]
        state = following[state, generator.choice(len(SUCCESSORS), state.shape, p=SUCCESSORS)]
    return found


def train(backend: str, shape: str, moved: bool) -> dict[str, Any]:
    """The loss of every step, and the mean held-out loss before and after."""
    from benchmarks.shapes import RandomSource, shape_spec
    from jaxsloth.backend import BuildOptions, OptimizerOptions, load_backend
    from jaxsloth.objectives.causal_lm import CausalLoss
    from jaxsloth.recipe import ScheduleRecipe
    from jaxsloth.training.initialize import initial_adapters
    from jaxsloth.training.schedule import learning_rate
    from jaxsloth.transforms import add_lora, quantize

    engine = load_backend(backend)
    dtype = "bfloat16" if engine.devices().platform == "cuda" else "float32"
    base = quantize(shape_spec(shape), nested=True)
    spec = add_lora(base, r=16, alpha=16.0)
    model = engine.build(base, RandomSource(base), BuildOptions(dtype=dtype))
    values = initial_adapters(spec, "kaiming", 0, model.base_tensor)
    if moved:
        values = {name: np.nextafter(value, np.float32(np.inf), dtype=np.float32) for name, value in values.items()}
    model.add_adapters(spec, values)
    held_out = [step_batch(ids) for ids in text(spec.embedding.vocab, HELD_OUT, 2)]
    before = evaluate(model, held_out)
    step_function, losses = model.step(CausalLoss(), OptimizerOptions()), []
    schedule = ScheduleRecipe(kind="cosine", warmup_steps=WARMUP)
    for step, ids in enumerate(text(spec.embedding.vocab, STEPS, 1)):
        rate = learning_rate(step, STEPS, LEARNING_RATE, schedule)
        losses.append(step_function(step_batch(ids), learning_rate=rate, step=step, seed=0).floats()[0])
    return {"losses": losses, "before": before, "after": evaluate(model, held_out)}


def evaluate(model: Any, step_batches: list[Any]) -> float:
    from jaxsloth.batch import Batch

    step, total, count = model.eval_step(), 0.0, 0
    for each in step_batches:
        batch = Batch(each.input_ids[0], each.targets[0], each.segments[0], each.positions[0], each.rows[0])
        loss, tokens = step(batch)
        total, count = total + float(loss), count + tokens
    return total / count


def judge(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The gap of every stage's mean loss beside the band, and the held-out improvements."""
    stages = {name: np.array(run["losses"]).reshape(-1, STAGE).mean(axis=1) for name, run in runs.items()}
    first, moved, other = stages.values()
    band, gap = np.abs(first - moved), np.abs(first - other)
    gains = {name: run["before"] - run["after"] for name, run in runs.items()}
    reference, *_, ours = gains.values()
    return {
        "gap": gap.tolist(),
        "band": band.tolist(),
        "largest_gap": float(gap.max()),
        "largest_band": float(band.max()),
        "improvement": gains,
        "improvement_difference": abs(ours - reference) / reference,
        "passed": bool(gap.max() <= BAND * band.max() and abs(ours - reference) <= HELD_OUT_BAR * reference),
    }


def main(
    shape: Annotated[str, typer.Option(help="a shape of benchmarks.shapes")] = "1b",
    output: Annotated[Path | None, typer.Option(help="where the runs and the verdict go, as JSON; a .png beside it")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Trains on both backends in NF4 and bfloat16 and compares the curves."""
    if worker is not None:
        print(json.dumps(train(RUNS[worker][0], shape, RUNS[worker][1])))
        return
    runs = {}
    for name in RUNS:
        command = [sys.executable, "-m", "benchmarks.parity_l5", "--shape", shape, "--worker", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            raise typer.Exit(done.returncode)
        runs[name] = json.loads(done.stdout.splitlines()[-1])
    verdict = judge(runs)
    print(json.dumps(verdict, indent=2))
    if output is not None:
        output.write_text(json.dumps({"runs": runs, "verdict": verdict}, indent=2) + "\n", encoding="utf-8")
        draw(runs, output.with_suffix(".png"))
    raise typer.Exit(0 if verdict["passed"] else 1)


def draw(runs: dict[str, dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, gaps) = plt.subplots(1, 2, figsize=(10, 4))
    for name, run in runs.items():
        curves.plot(run["losses"], label=name, linewidth=1)
    verdict, steps = judge(runs), np.arange(STAGE, STEPS + 1, STAGE)
    gaps.semilogy(steps, verdict["gap"], "o-", label="torch and jax")
    gaps.semilogy(steps, verdict["band"], "s--", label="torch, one ulp apart")
    curves.set(xlabel="step", ylabel="loss")
    gaps.set(xlabel="step", ylabel=f"gap of the mean loss of {STAGE} steps")
    curves.legend()
    gaps.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    typer.run(main)
