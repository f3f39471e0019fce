"""What `jaxsloth info` tells: versions, devices, families, what trains and decodes here, and each op's implementation."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxsloth import __version__
from jaxsloth.backend import BACKENDS, DtypeName, load_backend
from jaxsloth.extras import missing_packages
from jaxsloth.kernels.registry import WAYS, Facts, all_ops, select, written_by_itself
from jaxsloth.models.registry import families

PACKAGES = (
    *("torch", "triton", "jax", "jaxlib", "flax", "optax", "transformers", "datasets", "safetensors", "gguf"),
    *("bitsandbytes", "peft", "trl", "numpy"),
)
# What trains and decodes: (what it does, name of the choice) -> by what runs, its parts.
PASSES = {"training": "train_pass", "greedy decoding": "decode_step"}
PARTS = {
    ("train_pass", "torch"): "LoRA inside the frozen products, Triton kernels, cuDNN and flash attention, CUDA graphs",
    ("train_pass", "jax"): "LoRA inside the frozen products, Pallas kernels, cuDNN attention, one program a step",
    ("decode_step", "torch"): "NF4 read once a token, a CUDA graph a token",
    ("decode_step", "jax"): "NF4 read once a token, a program a burst of tokens",
}


def collect() -> dict[str, Any]:
    """Everything as plain data. A backend whose packages are missing is named with what it lacks."""
    backends: dict[str, Any] = {}
    ops: dict[str, Any] = {}
    passes: dict[str, Any] = {}
    for name in BACKENDS:
        missing = missing_packages(name)
        if missing:
            backends[name] = {"missing": missing, "install": f"pip install 'jaxsloth[{name}]'"}
            continue
        devices = load_backend(name).devices()
        backends[name] = {"platform": devices.platform, "device": devices.name, "count": devices.count}
        for title, choice in PASSES.items():
            reason, (written, other) = written_by_itself(devices.platform), WAYS[choice]
            how = f"{written}: {PARTS[choice, name]}" if reason is None else f"{other}, from the ops below ({written} {reason})"
            passes.setdefault(title, {})[name] = {"uses": written if reason is None else other, "how": how}
        dtype: DtypeName = "float32" if devices.platform == "cpu" else "bfloat16"
        for op in (one for one in all_ops() if one.of(name)):
            choice = select(op, name, Facts(devices.platform, dtype))
            refused = [{"name": other, "reason": reason} for other, reason in choice.refused]
            ops.setdefault(op.name, {})[name] = {"uses": choice.implementation.name, "refused": refused}
    return {
        "jaxsloth": __version__,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "backends": backends,
        "families": families(),
        "passes": passes,
        "ops": ops,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show(found: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]jaxsloth {found['jaxsloth']}[/], Python {found['python']}")
    versions = ", ".join(f"{name} {value or 'absent'}" for name, value in found["packages"].items())
    console.print(f"packages: {versions}")
    for name, backend in found["backends"].items():
        if "missing" in backend:
            console.print(f"backend {name}: needs {', '.join(backend['missing'])}; {backend['install']}", markup=False)
        else:
            console.print(f"backend {name}: {backend['count']} × {backend['device']}")
    for family, models in found["families"].items():
        console.print(f"family {family}: {models}")
    table = Table(title="what trains and decodes here")
    for column in ("pass", "backend", "uses"):
        table.add_column(column, overflow="fold")
    for title, by_backend in found["passes"].items():
        for backend, choice in by_backend.items():
            table.add_row(title, backend, choice["how"])
    console.print(table)
    alone = {choice["uses"] for choice in found["passes"].get("training", {}).values()} == {WAYS["train_pass"][1]}
    whose = "used by both" if alone else "used where a sublayer has no written pair for what is asked, and for sampling"
    table = Table(title=f"ops, {whose}")
    for column in ("op", "backend", "uses", "and why not the others"):
        table.add_column(column, overflow="fold")
    for op, by_backend in found["ops"].items():
        for backend, choice in by_backend.items():
            why = "; ".join(f"{refusal['name']} {refusal['reason']}" for refusal in choice["refused"])
            table.add_row(op, backend, choice["uses"], why)
    console.print(table)
