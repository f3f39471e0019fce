"""`make demo`: one recipe, both backends, real weights: NF4 QLoRA of SmolLM2-135M-Instruct on GSM8K; the losses compared."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jaxsloth import terminal
from jaxsloth.backend import BACKENDS
from jaxsloth.extras import require
from jaxsloth.recipe import Recipe, load_recipe

RECIPE = Path(__file__).resolve().parent.parent / "examples" / "gsm8k_qlora.yaml"
QUESTION = (
    "A baker bakes 12 loaves in the morning and twice as many in the afternoon. She sells 30 loaves. How many loaves are left?"
)
BAR = 1e-4
# Than the recipe: with the installation within six minutes on two cores. One length is one program to compile.
SHORTER = (
    *("steps=12", "accumulation=1", "data.limit=32", "data.validation_fraction=0.0"),
    *("data.max_length=160", "data.pad_to_multiple_of=160"),
)


def main() -> int:
    """Trains on each backend, prints both loss columns, an answer before and after, and where the files are.

    Returns:
        0 where the largest difference of the losses is at most `BAR` and the loss fell, else 1.
    """
    require("demo", "the demo")
    console = terminal.console()
    start = time.perf_counter()
    output = Path("outputs") / time.strftime("demo-%Y%m%d-%H%M%S")
    losses: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for backend in BACKENDS:
        console.rule(f"{backend}: NF4 QLoRA of SmolLM2-135M-Instruct on GSM8K")
        begun = time.perf_counter()
        changes = [*SHORTER, f"backend={backend}", f"checkpoints.output={output / backend}"]
        losses[backend] = _train(load_recipe(RECIPE, changes))
        seconds[backend] = time.perf_counter() - begun
    worst = max(abs(a - b) for a, b in zip(losses["torch"], losses["jax"], strict=True))
    console.print(_columns(losses))
    third = max(len(losses["torch"]) // 3, 1)
    fell = all(sum(run[:third]) > sum(run[-third:]) for run in losses.values())
    _plot(losses, output / "loss.png")
    _answers(console, output)
    console.print(f"largest difference of the losses: {worst:.2e} (bar {BAR:g}); loss {'fell' if fell else 'did not fall'}")
    console.print(f"adapters, logs and plots: {output} (both curves: {output / 'loss.png'})")
    each = ", ".join(f"{backend} {spent:.0f} s" for backend, spent in seconds.items())
    console.print(f"training took {sum(seconds.values()):.0f} s ({each}), all of it {time.perf_counter() - start:.0f} s")
    return 0 if worst <= BAR and fell else 1


def _train(recipe: Recipe) -> list[float]:
    from jaxsloth.training.run import train

    train(recipe)
    log = Path(recipe.checkpoints.output) / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def _columns(losses: dict[str, list[float]]) -> Table:
    table = Table(title="loss of every step")
    for column in ("step", *losses, "difference"):
        table.add_column(column, justify="right")
    for step, (first, second) in enumerate(zip(*losses.values(), strict=True), start=1):
        table.add_row(str(step), f"{first:.6f}", f"{second:.6f}", f"{abs(first - second):.1e}")
    return table


def _plot(losses: dict[str, list[float]], path: Path) -> None:
    from jaxsloth.training.plot import plot_losses

    curves = {name: (list(range(1, len(run) + 1)), run) for name, run in losses.items()}
    plot_losses(curves, path, title="SmolLM2-135M-Instruct, NF4 QLoRA on GSM8K: one recipe, two backends")


def _answers(console: Console, output: Path) -> None:
    """Greedy answers of the base and of the torch-trained adapter, both on the torch backend."""
    from jaxsloth import FastLanguageModel

    adapter = str(output / "torch" / "adapter")
    model, tokenizer = FastLanguageModel.from_pretrained(adapter, backend="torch", load_in_4bit=True, dtype="float32")
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    console.print(f"[bold]question[/] {QUESTION}")
    for label, adapters in (("before", model.disable_adapter()), ("after", nullcontext())):
        with adapters:
            answer = model.generate([prompt], max_new_tokens=48)[0]
        console.print(f"[bold]{label}[/] {answer.strip()}")


if __name__ == "__main__":
    sys.exit(main())
