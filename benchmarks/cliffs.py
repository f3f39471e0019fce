"""What a step off the golden path costs: one setting a row, through the calls that a user's script makes.

    python -m benchmarks.cliffs                                  # every row, torch, JAX and Unsloth
    python -m benchmarks.cliffs --rows golden,dropout --contenders torch,unsloth --output cliffs.json

Each contender is one process that imports once; each row loads the model anew, adds adapters, and trains by a trainer on rows
of token ids. Throughput is tokens over the wall clock between two moments at which the loss was read, so that nothing
is still under way. Peak memory is the framework's own, of training alone where it can tell.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import report
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.launch import nvidia_smi, worker_environment
from benchmarks.shapes import shape_spec
from benchmarks.work import FIRST_TOKEN, training_flops
from jaxsloth.transforms import add_lora

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS = ("torch", "jax", "unsloth")
FAMILIES = ("qwen2.5-7b", "qwen3-8b", "gemma2-9b", "gemma3-4b")


@dataclass(frozen=True)
class Cliff:
    """One row of the table. lora: get_peft_model's arguments beside r=16, alpha=16 on all projections. lengths: of the rows of
    a micro-batch, in turn; trainer: ours, or TRL's over our module. upper: adapters in the upper half of the layers only.
    shape: what follows the size's name, as in "-bias"; model: a shape of its own, whatever the size that is asked for."""

    name: str
    shape: str = ""
    model: str = ""
    lengths: tuple[int, ...] = (1024, 1024, 1024, 1024)
    accumulation: int = 1
    dtype: str = "bfloat16"
    lora: dict[str, Any] = field(default_factory=dict)
    upper: bool = False
    trainer: str = "own"
    bar: float = 0.8  # of our own golden path's FLOP rate


ROWS = {
    cliff.name: cliff
    for cliff in (
        Cliff("golden"),
        Cliff("dropout", lora={"lora_dropout": 0.05}, bar=0.9),
        Cliff("fp16", dtype="float16"),
        Cliff("r64-qkvo", lora={"r": 64, "target_modules": PROJECTIONS[:4]}),
        Cliff("upper-half", upper=True),
        Cliff("biases", shape="-bias", lora={"bias": "all"}),
        Cliff("head", lora={"modules_to_save": ["lm_head"]}),
        Cliff("rslora-256", lora={"r": 256, "use_rslora": True}),
        Cliff("length-1000", lengths=(1000,) * 4),
        Cliff("length-777", lengths=(777,) * 3),
        Cliff("short-row", lengths=(1024, 1024, 1024, 60)),
        Cliff("trl", trainer="trl"),
        Cliff("accumulation", lengths=(512,), accumulation=8),
        Cliff("qk-norm", shape="-qk_norm"),
        Cliff("sandwich", shape="-sandwich"),
        *(Cliff(name, model=name.replace("-", "_"), lengths=(2048,) * 4) for name in FAMILIES),
    )
}


def shape_of(cliff: Cliff, size: str) -> str:
    return cliff.model or size + cliff.shape


def arguments(cliff: Cliff, layers: int) -> dict[str, Any]:
    """get_peft_model's."""
    given: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": PROJECTIONS, "lora_dropout": 0.0, "bias": "none"}
    given |= {"random_state": 3407, "use_gradient_checkpointing": False, **cliff.lora}
    if cliff.upper:
        given["layers_to_transform"] = list(range(layers // 2, layers))
    return given


def token_rows(cliff: Cliff, vocab: int, steps: int) -> list[dict[str, list[int]]]:
    """Rows for so many steps, in the order of their micro-batches."""
    generator = np.random.Generator(np.random.Philox(1))
    lengths = cliff.lengths * (cliff.accumulation * steps)
    return [{"input_ids": generator.integers(FIRST_TOKEN, vocab, length).tolist()} for length in lengths]


def flops(cliff: Cliff, size: str) -> float:
    """Of one step, by the rows' own lengths."""
    spec = shape_spec(shape_of(cliff, size))
    own = arguments(cliff, len(spec.layers))
    targets, layers = own["target_modules"], own.get("layers_to_transform", range(len(spec.layers)))
    modules = [f"model.layers.{index}.{_part(name)}.{name}" for index in layers for name in targets]
    spec = add_lora(spec, r=own["r"], alpha=16.0, targets=modules)
    whole = "lm_head" in own.get("modules_to_save", ())
    return cliff.accumulation * sum(training_flops(spec, 1, length, trains_head=whole)["step"] for length in cliff.lengths)


def _part(name: str) -> str:
    return "self_attn" if name in PROJECTIONS[:4] else "mlp"


# --- the worker: one contender, all rows ---------------------------------------------------------------------------------


def work(contender: str, size: str, names: list[str], folder: Path, result: Path, warmup: int, steps: int) -> None:
    """Runs the rows one after the other in this process and writes {row: what was measured} after each."""
    api = api_of(contender)
    found: dict[str, Any] = {}
    for name in names:
        started = time.perf_counter()
        try:
            found[name] = _one(api, ROWS[name], size, folder, warmup, steps)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"}
        found[name]["row_s"] = time.perf_counter() - started
        print(contender, name, json.dumps(found[name]), flush=True)
        result.write_text(json.dumps(found), encoding="utf-8")
        gc.collect()
        api.release()


class _Clock:
    """Notes when a loss was read: trainers read it when they log."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        clock = self

        class Marks(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
                if logs and "loss" in logs:
                    clock.marks.append((state.global_step, time.perf_counter(), float(logs["loss"])))

        self.marks: list[tuple[int, float, float]] = []
        self.callback = Marks()


def _one(api: Any, cliff: Cliff, size: str, folder: Path, warmup: int, steps: int) -> dict[str, Any]:
    spec = shape_spec(shape_of(cliff, size))
    model, tokenizer = api.load(folder / f"random-{shape_of(cliff, size)}", max(cliff.lengths), cliff.dtype)
    model = api.adapt(model, arguments(cliff, len(spec.layers)))
    api.restart_peak()
    clock, total = _Clock(), warmup + steps
    rows = token_rows(cliff, spec.embedding.vocab, total)
    with tempfile.TemporaryDirectory() as output:
        settings = {
            "output_dir": output,
            "per_device_train_batch_size": len(cliff.lengths),
            "gradient_accumulation_steps": cliff.accumulation,
            "max_steps": total,
            "learning_rate": 1e-4,
            "optim": "adamw_torch",
            "weight_decay": 0.0,
            "lr_scheduler_type": "constant",
            "logging_steps": warmup,  # a loss that is read waits for the device
            "save_strategy": "no",
            "report_to": "none",
            "seed": 3407,
            "max_length": max(cliff.lengths),
            "packing": False,
            "fp16": cliff.dtype == "float16",
            "bf16": cliff.dtype == "bfloat16" and nvidia_smi("name") is not None,
            "use_cpu": nvidia_smi("name") is None,
            "train_sampling_strategy": "sequential",
            "disable_tqdm": True,
        }
        trainer = api.trainer(cliff.trainer, model, tokenizer, rows, settings)
        trainer.add_callback(clock.callback)
        trainer.train()
    marks = {step: (moment, loss) for step, moment, loss in clock.marks}
    seconds = marks[total][0] - marks[warmup][0]
    tokens = cliff.accumulation * sum(cliff.lengths)
    return {
        "tokens_per_s": steps * tokens / seconds,
        "step_ms": 1e3 * seconds / steps,
        "flops_per_s": steps * flops(cliff, size) / seconds,
        "losses": [marks[step][1] for step in sorted(marks)],
        "peak_bytes": api.peak(),
    }


def api_of(contender: str) -> Any:
    """The calls of a contender's library, which is imported here."""
    return _Unsloth() if contender == "unsloth" else _Own(contender)


class _Own:
    def __init__(self, backend: str) -> None:
        import jaxsloth
        from jaxsloth.backend import load_backend

        self._backend, self._jaxsloth, self._engine = backend, jaxsloth, load_backend(backend)  # type: ignore[arg-type]

    def load(self, folder: Path, length: int, dtype: str) -> Any:
        return self._jaxsloth.FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=length, dtype=dtype, load_in_4bit=True, backend=self._backend
        )

    def adapt(self, model: Any, given: dict[str, Any]) -> Any:
        return self._jaxsloth.FastLanguageModel.get_peft_model(model, **given)

    def for_inference(self, model: Any) -> None:
        self._jaxsloth.FastLanguageModel.for_inference(model)

    def trainer(self, kind: str, model: Any, tokenizer: Any, rows: Any, settings: dict[str, Any]) -> Any:
        if kind == "own":
            made = self._jaxsloth.SFTConfig(**settings)
            return self._jaxsloth.SFTTrainer(model, args=made, train_dataset=rows, processing_class=tokenizer)
        import trl
        from datasets import Dataset

        made = trl.SFTConfig(gradient_checkpointing=False, **settings)
        return trl.SFTTrainer(model, args=made, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    def restart_peak(self) -> None:
        if self._backend == "torch":
            _restart_peak()

    def peak(self) -> int | None:
        """Of JAX: of the whole process, so a row's is at least what an earlier one had."""
        return self._engine.peak_memory()

    def release(self) -> None:
        if self._backend == "torch":
            _empty_cache()


class _Unsloth:
    def __init__(self) -> None:
        from unsloth import FastLanguageModel  # isort: skip  (before everything that it patches)

        import trl
        from datasets import Dataset

        self._model, self._trl, self._dataset = FastLanguageModel, trl, Dataset

    def load(self, folder: Path, length: int, dtype: str) -> Any:
        import torch

        return self._model.from_pretrained(str(folder), max_seq_length=length, dtype=getattr(torch, dtype), load_in_4bit=True)

    def adapt(self, model: Any, given: dict[str, Any]) -> Any:
        return self._model.get_peft_model(model, **given)

    def for_inference(self, model: Any) -> None:
        self._model.for_inference(model)

    def trainer(self, kind: str, model: Any, tokenizer: Any, rows: Any, settings: dict[str, Any]) -> Any:
        del kind
        data = self._dataset.from_list(rows)
        return self._trl.SFTTrainer(
            model=model, args=self._trl.SFTConfig(**settings), train_dataset=data, processing_class=tokenizer
        )

    def restart_peak(self) -> None:
        _restart_peak()

    def peak(self) -> int | None:
        from benchmarks.peers.torch_loop import peak_memory

        return peak_memory()

    def release(self) -> None:
        _empty_cache()


def _restart_peak() -> None:
    from benchmarks.peers.torch_loop import restart_peak

    restart_peak()


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the table -----------------------------------------------------------------------------------------------------------


def add_ratios(found: dict[str, dict[str, Any]]) -> None:
    """of_peer: times Unsloth's tokens/s of the same row; of_golden: of the contender's own FLOP rate on the golden path."""
    for contender, rows in found.items():
        golden = rows.get("golden", {}).get("flops_per_s")
        for name, row in rows.items():
            peer = found.get("unsloth", {}).get(name, {}).get("tokens_per_s")
            if "tokens_per_s" in row and peer and contender != "unsloth":
                row["of_peer"] = row["tokens_per_s"] / peer
            if "tokens_per_s" in row and golden:
                row["of_golden"] = row["flops_per_s"] / golden


def print_table(found: dict[str, dict[str, Any]], title: str) -> None:
    table = []
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        for contender, rows in found.items():
            row = rows.get(name)
            if row is None:
                continue
            if "error" in row:
                table.append((name, contender, f"[red]{row['error'][:90]}[/]"))
                continue
            ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("of_peer", "of_golden")]
            numbers = (f"{row['tokens_per_s']:,.0f}", f"{row['step_ms']:.1f}", report.gib(row["peak_bytes"]))
            table.append((name, contender, *numbers, *ratios, f"{row['losses'][-1]:.4f}"))
    columns = ("row", "contender", "tokens/s", "ms a step", "peak GiB", "×Unsloth", "×golden FLOP/s", "last loss")
    report.print_table(title, columns, table)


def main(
    rows: Annotated[str, typer.Option(help="comma-separated; default: all but whole families")] = ",".join(
        name for name, cliff in ROWS.items() if not cliff.model
    ),
    contenders: Annotated[str, typer.Option(help="comma-separated, of torch, jax, unsloth")] = ",".join(CONTENDERS),
    size: Annotated[str, typer.Option(help="tiny, 1b, 3b or 8b")] = "3b",
    warmup: Annotated[int, typer.Option(help="steps before the clock starts; losses are read every so many")] = 4,
    steps: Annotated[int, typer.Option(help="timed steps, a multiple of warmup")] = 8,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take for all rows")] = 900.0,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    result: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Times every row for every contender, each contender in a process of its own."""
    names = rows.split(",")
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise typer.BadParameter(f"rows must be of {', '.join(ROWS)}; got {', '.join(unknown)}")
    if warmup < 1 or steps < 1 or steps % warmup:
        raise typer.BadParameter(f"steps must be a multiple of warmup, at least 1; got steps={steps}, warmup={warmup}")
    place = scratch_folder(scratch)
    if worker is not None and result is not None:
        work(worker, size, names, place, result, warmup, steps)
        return
    for shape in dict.fromkeys(shape_of(ROWS[name], size) for name in names):
        ensure_checkpoint(shape, place)
    found: dict[str, dict[str, Any]] = {}
    for contender in contenders.split(","):
        found[contender] = _run(contender, names, size, place, warmup, steps, timeout)
        add_ratios(found)
        if output is not None:
            about = {name: asdict(ROWS[name]) for name in names}
            report.save(output, "cliffs", {"size": size, "rows": about, "results": found})
    print_table(found, f"cliffs: {size}, NF4, nothing recomputed")


def _run(contender: str, names: list[str], size: str, place: Path, warmup: int, steps: int, timeout: float) -> dict[str, Any]:
    """What a contender's process has written by its end, or by the time that it may take."""
    with tempfile.TemporaryDirectory(dir=place) as own:
        result = Path(own) / "result.json"
        command = [sys.executable, "-m", "benchmarks.cliffs", "--worker", contender, "--result", str(result)]
        command += ["--rows", ",".join(names), "--size", size, "--scratch", str(place)]
        command += ["--warmup", str(warmup), "--steps", str(steps)]
        try:
            done = subprocess.run(command, cwd=own, env=worker_environment(place), timeout=timeout, check=False)
            reason = f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout:.0f} s"
        rows = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        return {name: rows.get(name, {"error": reason}) for name in names}


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    typer.run(main)
