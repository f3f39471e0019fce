"""One contender in this process: ``python -m benchmarks.worker TASK.json``. Its result goes to the file that the task names.

Result files, not the standard output: the libraries print there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS
from benchmarks.work import Runner, Work, compared_names, documents, tokens

PAD_TO = 64  # what a padded batch's length is rounded up to: a compilation, or a CUDA graph, a length


def main(task_file: Path) -> None:
    """Runs the task that benchmarks.launch writes: {contender, work, folder, result, ready, gradients, profile, started}.

    It waits for a line when all is imported, so that the next contender can import while the one before it loads and compiles.
    The line may name a file to wait for before anything is timed: the next one's, which is there when it has imported.
    """
    task = json.loads(task_file.read_text(encoding="utf-8"))
    work = Work(**task["work"])
    try:
        build = CONTENDERS[task["contender"]].load()
    finally:  # nobody is to wait for one that failed
        Path(task["ready"]).touch()
    imported = time.time()
    line = sys.stdin.readline()
    if not line:  # who started this is gone
        return
    begun = time.time()
    runner = build(Path(task["folder"]), work)
    loaded = time.time()
    found: dict[str, Any] = {"import_s": imported - task["started"], "load_s": loaded - begun}
    if work.documents:
        found |= epochs(runner, work)
    else:
        found |= train(runner, work, task, line.strip())
    found["start_to_first_step_s"] = found["import_s"] + found["load_s"] + found["times_s"][0]
    found["peak_bytes"] = runner.peak_memory()
    if task["profile"]:
        found["kernels"] = _profile(runner, work)
    result = Path(task["result"])
    result.with_suffix(".tmp").write_text(json.dumps(found), encoding="utf-8")
    os.replace(result.with_suffix(".tmp"), result)


def train(runner: Runner, work: Work, task: dict[str, Any], awaited: str) -> dict[str, Any]:
    """Times warm-up and steps on one batch; the first step's gradients go to a file."""
    ids = tokens(work)
    times, losses = [], []
    for step in range(work.warmup + work.steps):
        if step == max(work.warmup - 1, 0) and awaited:
            _wait_for(Path(awaited))
        start = time.perf_counter()
        losses.append(runner.step(ids))
        times.append(time.perf_counter() - start)
        if step == 0 and task["gradients"]:
            gradients = runner.gradients(compared_names(work))
            if gradients:
                np.savez(task["gradients"], **gradients)  # type: ignore[arg-type]
    return {"times_s": times, "losses": losses if any(losses) else []}


def _wait_for(file: Path, most_s: float = 90.0) -> None:
    """Not for ever: who was to write it may have been killed."""
    end = time.monotonic() + most_s
    while not file.exists() and file.parent.is_dir() and time.monotonic() < end:
        time.sleep(0.05)


def epochs(runner: Runner, work: Work) -> dict[str, Any]:
    """Times whole epochs over the documents; the warm-up epochs have learning rate 0, so that their loss is the model's own."""
    from benchmarks.peers.own import OwnRunner
    from jaxsloth.data.encode import Example
    from jaxsloth.data.step_batches import StepBatches

    if not isinstance(runner, OwnRunner):
        raise TypeError("only jaxsloth's contenders are measured over documents")
    examples = [Example(tokens, np.ones(len(tokens), bool)) for tokens in documents(work)]
    stream = StepBatches(
        examples,
        batch_size=work.batch,
        accumulation=1,
        seed=0,
        shuffle=False,  # every epoch has the same shapes, so that the timed ones compile nothing
        packing=work.packing,
        max_length=work.length,
        pad_to_multiple_of=PAD_TO,
    )
    times, losses, shapes = [], [], set()
    for epoch in range(work.warmup + work.steps):
        loss = valid = seconds = 0.0
        for step in range(stream.steps_per_epoch):
            step_batch = stream.batch(epoch * stream.steps_per_epoch + step)
            start = time.perf_counter()
            mean = runner.train_on(step_batch, work.learning_rate if epoch >= work.warmup else 0.0)
            seconds += time.perf_counter() - start
            loss, valid = loss + mean * step_batch.valid_tokens, valid + step_batch.valid_tokens
            shapes.add(step_batch.input_ids.shape[1:])
        times.append(seconds)
        losses.append(loss / valid)
    tokens = sum(len(example.tokens) for example in examples)
    return {"times_s": times, "losses": losses, "tokens": tokens, "steps": stream.steps_per_epoch, "shapes": len(shapes)}


def _profile(runner: Runner, work: Work) -> Any:
    """What ran, or why that can't be told: a profiler that fails must not cost the measurement."""
    from benchmarks.profiler import kernels_of

    inputs = tokens(work)

    try:
        return kernels_of(runner.framework, lambda: runner.step(inputs))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
