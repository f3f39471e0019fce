"""How fast are answers? ``python -m benchmarks.decode --size 3b``

``model.generate`` as a script calls it after ``FastLanguageModel.for_inference``, or on transformers' own model: greedy and
sampled, short and long prompts, batches. Each contender is one process that imports and loads once. A call before the timed
ones compiles and records what it needs; the median of the others is told, prefill included, and apart from that the time to
the first token. Another call asks for another prompt length, and a sampled one for another temperature: what it takes beyond
the calls before it is what is compiled or recorded anew.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import report
from benchmarks.checkpoint import ensure_checkpoint, scratch_folder
from benchmarks.cliffs import ROWS, api_of, arguments
from benchmarks.launch import default_dtype, worker_environment
from benchmarks.shapes import shape_spec
from benchmarks.work import FIRST_TOKEN, Work, weight_bytes

BANDWIDTH = 4.3e12  # bytes/s that one H200's memory copies, read and written together
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "min_p": {"do_sample": True, "temperature": 1.5, "min_p": 0.1},
    "top_p": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50},
    "nucleus": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
    "plain": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "engine": {},  # greedy too, but jaxsloth.generation.generate, inside which model.generate's tokens are chosen
}
DEFAULT_WAYS = ("greedy", "min_p", "top_p")
# Contenders whose settings are of the environment: theirs, and what is set.
ENVIRONMENTS = {"unsloth-graphs": ("unsloth", {"UNSLOTH_DECODE_CUDA_GRAPHS": "1"})}
CONTENDERS = ("torch", "jax", "unsloth", "unsloth-graphs", "hf")
DEFAULT = ",".join(CONTENDERS[:4])


class _HuggingFace:
    """transformers and bitsandbytes."""

    def load(self, folder: Path, length: int, dtype: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        kind = getattr(torch, dtype)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
        )
        device = {"": 0 if torch.cuda.is_available() else "cpu"}
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, attn_implementation="sdpa", quantization_config=quantization, device_map=device
        ), None

    def for_inference(self, model: Any) -> None:
        model.eval()

    def peak(self) -> int | None:
        from benchmarks.peers.torch_loop import peak_memory

        return peak_memory()


# --- the worker: one contender, all rows ---------------------------------------------------------------------------------


def work(contender: str, rows: dict[str, Any], folder: Path, result: Path, profile: bool) -> None:
    """Runs the rows one after the other and writes {row: what was measured} after each."""
    started = time.perf_counter()
    own = contender in ("torch", "jax")
    api = _HuggingFace() if contender == "hf" else api_of(contender)
    imported = time.perf_counter()
    longest = max(rows["prompts"]) + rows["new"]
    model, _ = api.load(folder, longest, rows["dtype"])
    if rows["adapters"]:
        model = api.adapt(model, arguments(ROWS["golden"], len(shape_spec(rows["size"]).layers)))
    api.for_inference(model)
    print(f"{contender}: imports {imported - started:.1f} s, loading {time.perf_counter() - imported:.1f} s", flush=True)
    found: dict[str, Any] = {}
    for prompt, batch, way in ((p, b, w) for p in rows["prompts"] for b in rows["batches"] for w in rows["ways"]):
        if way == "engine" and not own:
            continue
        name = f"{way}, {batch} × {prompt}"
        try:
            found[name] = _one(model, way, batch, prompt, rows) | {"batch": batch, "prompt": prompt, "way": way}
            found[name]["peak_bytes"] = api.peak()
            if profile:
                _profiled(model, contender, way, batch, prompt, rows)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        print(contender, name, json.dumps({key: found[name][key] for key in found[name] if key != "said"}), flush=True)
        result.write_text(json.dumps(found), encoding="utf-8")


def _call(model: Any, way: str, ids: Any, new: int, **other: Any) -> np.ndarray:
    """One call, the answer on the host: the device is done then. int ``[batch, new tokens]``."""
    import torch

    if way == "engine":
        from jaxsloth.generation import GenerationSettings, generate

        inner = getattr(model, "get_base_model", lambda: model)()
        rows = generate(inner.engine.model, ids.tolist(), GenerationSettings(max_new_tokens=new, eos_ids=()))
        return np.array(rows, np.int64)
    asked = WAYS[way] | {"max_new_tokens": new, "pad_token_id": 0, "use_cache": True} | other
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    return answer.cpu().numpy()[:, ids.shape[1] :]


def _prompts(rows: dict[str, Any], batch: int, prompt: int) -> Any:
    import torch

    generator = np.random.Generator(np.random.Philox(2))
    vocab = shape_spec(rows["size"]).embedding.vocab
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.from_numpy(generator.integers(FIRST_TOKEN, vocab, (batch, prompt))).to(device)


def _timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def _one(model: Any, way: str, batch: int, prompt: int, rows: dict[str, Any]) -> dict[str, Any]:
    ids, new = _prompts(rows, batch, prompt), rows["new"]
    first_s, answer = _timed(lambda: _call(model, way, ids, new))
    calls = [_timed(lambda: _call(model, way, ids, new)) for _ in range(rows["repeat"])]
    seconds, count = statistics.median(took for took, _ in calls), answer.shape[1]
    token_s, _ = _timed(lambda: _call(model, way, ids, 1))
    token_s = min(token_s, _timed(lambda: _call(model, way, ids, 1))[0])
    found = {
        "tokens_per_s": batch * count / seconds,
        "decode_tokens_per_s": batch * (count - 1) / max(seconds - token_s, 1e-9),
        "first_token_s": token_s,
        "median_s": seconds,
        "first_s": first_s,
        "tokens": count,
        "said": answer[0, :16].tolist(),
    }
    if rows["other"]:
        warmer = {"temperature": 0.9 * WAYS[way]["temperature"]} if "temperature" in WAYS[way] else {}
        found["other_s"] = _timed(lambda: _call(model, way, ids[:, 3:], new, **warmer))[0]
    return found


def _profiled(model: Any, contender: str, way: str, batch: int, prompt: int, rows: dict[str, Any]) -> None:
    from benchmarks.profiler import kernels_of

    ids = _prompts(rows, batch, prompt)
    kernels = kernels_of("jax" if contender == "jax" else "torch", lambda: _call(model, way, ids, rows["new"]))
    report.print_kernels([{"label": f"{contender}, {way}, {batch} × {prompt}", "kernels": kernels}])


# --- the table -----------------------------------------------------------------------------------------------------------


def run(contender: str, rows: dict[str, Any], place: Path, timeout: float, profile: bool = False) -> dict[str, Any]:
    """What a contender's process has measured by its end, or by the time that it may take."""
    named, environment = ENVIRONMENTS.get(contender, (contender, {}))
    with tempfile.TemporaryDirectory(dir=place) as own:
        result, task = Path(own) / "result.json", Path(own) / "task.json"
        task.write_text(json.dumps(rows), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.decode", "--worker", named, "--task", str(task), "--result", str(result)]
        command += ["--scratch", str(place), *(["--profile"] if profile else [])]
        try:
            done = subprocess.run(command, cwd=own, env=worker_environment(place) | environment, timeout=timeout, check=False)
            reason = f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout:.0f} s"
            report.console.print(f"{contender}: {reason}")
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        return found or {"everything": {"error": reason}}


def print_table(found: dict[str, dict[str, Any]], title: str, limits: dict[str, float]) -> None:
    """Tokens/s over all rows; in brackets without prefill."""
    lines = []
    for row in dict.fromkeys(row for of in found.values() for row in of):
        cells = [row]
        for of in found.values():
            one = of.get(row, {})
            whole, alone = (f"{one[key]:,.0f}" if key in one else "" for key in ("tokens_per_s", "decode_tokens_per_s"))
            cells.append(f"{whole} ({alone})" if whole else one.get("error", "")[:40])
        lines.append((*cells, f"{limits[row]:,.0f}" if row in limits else ""))
    report.print_table(title, ("way, batch × prompt", *found, "limit"), lines)


def main(
    size: Annotated[str, typer.Option(help="tiny, 1b, 3b or 8b")] = "3b",
    contenders: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(CONTENDERS)}")] = DEFAULT,
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8",
    prompts: Annotated[str, typer.Option(help="tokens of a prompt, comma-separated")] = "128",
    ways: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(WAYS)}")] = ",".join(DEFAULT_WAYS),
    new: Annotated[int, typer.Option(help="tokens of an answer")] = 128,
    repeat: Annotated[int, typer.Option(help="timed calls")] = 2,
    adapters: Annotated[bool, typer.Option(help="with LoRA active; default: the base alone")] = False,
    other: Annotated[bool, typer.Option(help="one more call, of another length and temperature")] = True,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: bfloat16 on a GPU")] = None,
    profile: Annotated[bool, typer.Option(help="trace one more call a row and print the kernels that ran")] = False,
    scratch: Annotated[Path | None, typer.Option(help="where checkpoints are written; default: in memory")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file")] = None,
    timeout: Annotated[float, typer.Option(help="seconds that one contender may take")] = 240.0,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
    task: Annotated[Path | None, typer.Option(hidden=True)] = None,
    result: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Times model.generate for every contender, each in a process of its own."""
    place = scratch_folder(scratch)
    if worker is not None and task is not None and result is not None:
        rows = json.loads(task.read_text(encoding="utf-8"))
        work(worker, rows, place / f"random-{rows['size']}", result, profile)
        return
    for name, given, known in (("ways", ways, WAYS), ("contenders", contenders, CONTENDERS)):
        unknown = sorted(set(given.split(",")) - set(known))
        if unknown:
            raise typer.BadParameter(f"{name} must be of {', '.join(known)}; got {', '.join(unknown)}")
    rows = {"size": size, "new": new, "repeat": repeat, "adapters": adapters, "other": other, "ways": ways.split(",")}
    rows |= {"batches": [int(one) for one in batches.split(",")], "prompts": [int(one) for one in prompts.split(",")]}
    rows["dtype"] = dtype or default_dtype()
    ensure_checkpoint(size, place)
    read = weight_bytes(Work(size))
    limits = {f"{w}, {b} × {p}": b * BANDWIDTH / read for w in rows["ways"] for b in rows["batches"] for p in rows["prompts"]}
    found: dict[str, dict[str, Any]] = {}
    title = f"model.generate, {size}, NF4, {new} new tokens: tokens/s (without prefill)"
    for contender in contenders.split(","):
        found[contender] = run(contender, rows, place, timeout, profile)
        print_table(found, title, limits)
        if output is not None:
            report.save(output, "decode", {title: {"rows": rows, "results": found}})


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    typer.run(main)
