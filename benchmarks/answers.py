"""``model.generate`` as a script calls it after ``FastLanguageModel.for_inference``: greedy and sampled, tokens/s.

    python -m benchmarks.answers --contenders torch,jax,unsloth --batches 1,16

Each contender is one process. A call before the timed ones compiles and records what it needs; the median of three is told,
prefill included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import report
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.cliffs import CONTENDERS, api_of
from benchmarks.launch import worker_environment
from benchmarks.shapes import shape_spec
from benchmarks.work import FIRST_TOKEN

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "min_p": {"do_sample": True, "temperature": 1.5, "min_p": 0.1},
    "top_p": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50},
}
REPEATS = 3


def work(contender: str, size: str, batches: list[int], ways: list[str], folder: Path, prompt: int, new: int) -> dict[str, Any]:
    import torch

    api = api_of(contender)
    model, _ = api.load(folder, prompt + new, "bfloat16")
    api.for_inference(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = np.random.Generator(np.random.Philox(2))
    found: dict[str, Any] = {}
    for batch in batches:
        ids = torch.from_numpy(generator.integers(FIRST_TOKEN, shape_spec(size).embedding.vocab, (batch, prompt))).to(device)
        for way in ways:
            times = []
            for _ in range(1 + REPEATS):
                start = time.perf_counter()
                answer = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    pad_token_id=0,
                    use_cache=True,
                    **WAYS[way],
                )
                count = answer.shape[1] - prompt  # on the host: the device is done
                answer.cpu()
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[1:])
            found[f"{way} × {batch}"] = {"tokens_per_s": batch * count / seconds, "first_s": times[0], "tokens": count}
            print(contender, way, batch, found[f"{way} × {batch}"], flush=True)
    return found


def main(
    contenders: Annotated[str, typer.Option(help="comma-separated, of torch, jax, unsloth")] = ",".join(CONTENDERS),
    size: Annotated[str, typer.Option(help="tiny, 1b, 3b or 8b")] = "3b",
    batches: str = "1,16",
    ways: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(WAYS)}")] = ",".join(WAYS),
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 128,
    new: Annotated[int, typer.Option(help="tokens of an answer")] = 64,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take")] = 300.0,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    result: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Times model.generate for every contender, each in a process of its own."""
    place, sizes, chosen = scratch_folder(scratch), [int(batch) for batch in batches.split(",")], ways.split(",")
    folder = ensure_checkpoint(size, place)
    if worker is not None and result is not None:
        result.write_text(json.dumps(work(worker, size, sizes, chosen, folder, prompt, new)), encoding="utf-8")
        return
    found: dict[str, Any] = {}
    for contender in contenders.split(","):
        with tempfile.TemporaryDirectory(dir=place) as own:
            file = Path(own) / "result.json"
            command = [sys.executable, "-m", "benchmarks.answers", "--worker", contender, "--result", str(file), "--size", size]
            command += [
                "--batches",
                batches,
                "--ways",
                ways,
                "--prompt",
                str(prompt),
                "--new",
                str(new),
                "--scratch",
                str(place),
            ]
            try:
                subprocess.run(command, cwd=own, env=worker_environment(place), timeout=timeout, check=False)
            except subprocess.TimeoutExpired:
                report.console.print(f"{contender}: not done after {timeout:.0f} s")
            found[contender] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = list(dict.fromkeys(row for of in found.values() for row in of))
    cells = [(row, *(f"{of[row]['tokens_per_s']:,.0f}" if row in of else "" for of in found.values())) for row in rows]
    report.print_table(f"model.generate, {size}, NF4, prompts of {prompt}: tokens/s", ("way × batch", *found), cells)
    if output is not None:
        report.save(output, "answers", {"size": size, "prompt": prompt, "new": new, "results": found})


if __name__ == "__main__":
    typer.run(main)
