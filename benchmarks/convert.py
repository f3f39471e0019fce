"""Conversions of a large random bf16 checkpoint on the CPU: seconds, GB/s of the source, and the process' peak memory.

    python -m benchmarks.convert --shape 8b --folder /tmp/bench

Each contender is a process of its own. Peak memory is the anonymous memory (RssAnon): pages of files that are mapped, which the
resident size counts too, are the system's to take back. The bar is 2 x the largest tensor as it is stored, in bf16, + 1 GiB.
"ggml" is what llama-quantize does, with libgguf: tensor by tensor to float32, its rows on all cores, the blocks to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxsloth.convert.safetensors_writer import SafetensorsWriter
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.registry import spec_from_config
from tests.support.tiny import CONFIG, byte_tokenizer, with_merge

# hidden, intermediate, layers, heads, kv_heads, vocabulary
SHAPES = {
    "small": (512, 1536, 4, 8, 2, 8192),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "8b-4": (4096, 14336, 4, 32, 8, 128256),  # the same with 4 layers
}
CONTENDERS = ("bnb-4bit", "q4_k_m", "ggml", "transformers")


def write_model(folder: Path, shape: str) -> None:
    """A random llama in bf16: one block of normal values, rolled, so that writing is not what takes the time."""
    hidden, width, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = CONFIG | {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "dtype": "bfloat16"}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "vocab_size": vocab}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    byte_tokenizer().save_pretrained(folder)
    with_merge(folder)
    block = np.random.Generator(np.random.Philox(0)).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16)
    shapes = tensor_shapes(spec_from_config(config))
    with SafetensorsWriter(folder, list(shapes)) as writer:
        for number, (name, size) in enumerate(shapes.items()):
            writer.add((name, np.resize(np.roll(block, 4099 * number), size)))


def convert_one(what: str, source: Path, out: Path) -> None:
    """One contender's work, in this process."""
    from jaxsloth.convert.run import Options, convert, plan

    if what == "bnb-4bit":
        convert(plan(str(source), out, "bnb-4bit"))
    elif what == "q4_k_m":
        convert(plan(str(source), out / "m.gguf", "gguf", Options(outtype="q4_k_m")))
    elif what == "ggml":
        _ggml(source, out)
    else:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, dtype=torch.bfloat16, device_map="cpu")
        model.save_pretrained(out)


def _ggml(source: Path, out: Path) -> None:
    import libgguf
    from gguf import GGMLQuantizationType

    from jaxsloth.convert.checkpoint import open_checkpoint
    from jaxsloth.convert.gguf_types import OUT_TYPES
    from jaxsloth.convert.gguf_writer import plan_tensors

    found, cores = open_checkpoint(source), os.cpu_count() or 1
    out.mkdir()
    with (out / "blocks").open("wb") as file, ThreadPoolExecutor(cores) as threads:
        for tensor in plan_tensors(found.spec(), OUT_TYPES["q4_k_m"]):
            value = np.asarray(found.source.read(tensor.hf_name)).astype(np.float32)
            kind = GGMLQuantizationType[tensor.kind]
            parts = [value]
            if tensor.kind != "F32":
                rows = np.array_split(value, cores)
                parts = list(threads.map(lambda part, kind=kind: libgguf.quantize_rows(part, kind), rows))
            for part in parts:
                part.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def measured(what: str, source: Path, out: Path) -> dict[str, Any]:
    """Runs a contender in a process of its own. Where it fails: its last line."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.convert", "--one", what, "--source", str(source), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        return {"what": what, "failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _run_one(what: str, source: Path, out: Path) -> None:
    peak = _Peak()
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    start = time.perf_counter()
    convert_one(what, source, out)
    seconds = time.perf_counter() - start
    found = {"what": what, "seconds": seconds, "gb_per_s": size / seconds / 1e9, "anonymous_gib": peak.stop()}
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(found | {"resident_gib": used.ru_maxrss / 2**20, "cpu_seconds": used.ru_utime + used.ru_stime}))


class _Peak:
    """The largest anonymous memory of this process, looked at every 20 ms; it begins with what imports took."""

    def __init__(self) -> None:
        self._largest, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            text = Path("/proc/self/status").read_text(encoding="utf-8")
            line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
            self._largest = max(self._largest, int(line.split()[1]))

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return self._largest / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench-convert"))
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--one", choices=CONTENDERS)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one:
        _run_one(options.one, options.source, options.out)
        return
    source = options.folder / f"model-{options.shape}"
    try:
        write_model(source, options.shape)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        hidden, width, *_, vocab = SHAPES[options.shape]
        bar = 2 * max(hidden * vocab, hidden * width) * 2 / 2**30 + 1
        print(f"{options.shape}: {size / 1e9:.2f} GB in bf16, {os.cpu_count()} cores; memory bar {bar:.2f} GiB", flush=True)
        for what in options.contenders:
            found = measured(what, source, options.folder / "out")
            print(json.dumps(found | {"load_average": os.getloadavg()}), flush=True)
    finally:
        shutil.rmtree(source, ignore_errors=True)


if __name__ == "__main__":
    main()
