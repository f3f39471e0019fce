"""What `jaxsloth info` tells: versions, devices, families, what trains and decodes here, each op's implementation; and how the
blocks of a model train."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsloth import __version__
from jaxsloth.backend import BACKENDS, BuildOptions, DtypeName, load_backend
from jaxsloth.convert.checkpoint import described_model
from jaxsloth.extras import missing_packages
from jaxsloth.kernels.registry import WAYS, RefusedError, Target, all_ops, select, today_of, written_by_itself
from jaxsloth.models.buildable import decode_refusal
from jaxsloth.models.registry import families
from jaxsloth.models.spec import ModelSpec
from jaxsloth.recipe import Recipe
from jaxsloth.training.initialize import with_adapters
from jaxsloth.transforms import add_lora

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
            choice = select(op, name, Target(devices.platform, dtype))
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


def model_passes(model: str | None, recipe: Recipe | None) -> dict[str, Any]:
    """How the blocks of a model train on each backend, as plain data, by its config alone.

    Args:
        model: what `jaxsloth generate` takes; None is the recipe's.
        recipe: whose adapters, precision and requests count; None: LoRA of rank 16 on all linear layers.

    Raises:
        ValueError: there is no such model, or it is not supported.
    """
    name = model or (recipe.model if recipe is not None else "")
    spec = described_model(name)
    spec = add_lora(spec, r=16, alpha=16) if recipe is None else with_adapters(recipe, spec)[0]
    assert spec.lora is not None
    lora, backends = spec.lora, {}
    for backend in BACKENDS:
        missing = missing_packages(backend)
        backends[backend] = {"error": f"needs {', '.join(missing)}"} if missing else passes_of(backend, spec, recipe)
    return {
        "model": name,
        "family": spec.family,
        "layers": len(spec.layers),
        "adapters": f"LoRA r={lora.r} on {len(lora.modules)} layers, dropout {lora.dropout:g}, bias {lora.bias}",
        "whole": list(lora.modules_to_save),
        "decoding": decode_refusal(spec),
        "backends": backends,
    }


def features(spec: ModelSpec) -> list[str]:
    """What distinguishes a model's blocks from Llama's, in the words of the field."""
    attentions, block = [layer.attention for layer in spec.layers], spec.layers[0]
    attention, mlp = block.attention, block.mlp
    windows = [one.window for one in attentions if one.window is not None]
    where = "" if len(windows) == len(attentions) else f" in {len(windows)} of {len(attentions)} blocks"
    turned = [one.rope for one in attentions if one.rope is not None]
    named = {
        "biases of q, k, v": attention.qkv_bias,
        "a bias of o": attention.out_bias,
        "norms of q and k": attention.qk_norm is not None,
        f"a window of {max(windows, default=0)} tokens{where}": bool(windows),
        "soft caps": attention.soft_cap is not None or spec.head.soft_cap is not None,
        "norms behind the parts too": any(branch.post_norm is not None for branch in block.branches),
        "norms of 1 + weight": any(norm.weight_offset for branch in block.branches for norm in branch.norms.values()),
        "fused projections": attention.fused_qkv or mlp.fused,
        f"no rotary positions in {len(attentions) - len(turned)} of {len(attentions)} blocks": len(turned) < len(attentions),
        f"{len(set(turned))} rotary embeddings": len(set(turned)) > 1,
        f"{mlp.activation} for silu": mlp.activation != "silu",
        "scaled embeddings": spec.embedding.scale != 1.0,
        "a tied head": spec.head.tied,
    }
    return [name for name, has in named.items() if has]


def show_families(found: dict[str, Any], console: Console) -> None:
    table = Table(title="families; how their blocks train, LoRA on every linear layer")
    backends = list(next(iter(found.values()))["trains"])
    for column in ("family", "models", "beside Llama's", *backends):
        table.add_column(column, overflow="fold")
    for name, family in found.items():
        trains = ["\n".join(blocks) if isinstance(blocks, list) else blocks for blocks in family["trains"].values()]
        has = "; ".join(family["has"]) or "–"
        table.add_row(f"{name}\n{family['architecture']}", family["covers"], has, *(Text(text) for text in trains))
    console.print(table)


def passes_of(backend: str, spec: ModelSpec, recipe: Recipe | None) -> dict[str, Any]:
    engine = load_backend(backend)
    platform_name = engine.devices().platform
    dtype: DtypeName = "float32" if platform_name == "cpu" else "bfloat16"
    if recipe is not None and recipe.dtype != "auto":
        dtype = recipe.dtype
    asked = dict(recipe.implementations or {}) if recipe is not None else {}
    written, other = WAYS["train_pass"]
    requested = today_of("train_pass", asked.get("train_pass"))
    reason = written_by_itself(platform_name) if requested is None else None
    try:
        blocks = engine.training_passes(
            spec, BuildOptions(dtype, implementations=asked, compute=recipe.compute if recipe else "exact")
        )
    except (ValueError, RefusedError) as error:
        return {"error": str(error)}
    uses = requested or (written if reason is None else other)
    why = "as asked for" if requested is not None else f"{written} {reason}" if reason is not None else None
    return {"uses": uses, "why": why, "blocks": blocks}


def show_model(found: dict[str, Any], console: Console) -> None:
    whole = f"; trained whole: {', '.join(found['whole'])}" if found["whole"] else ""
    console.print(f"{found['model']}: {found['family']}, {found['layers']} blocks; {found['adapters']}{whole}", markup=False)
    table = Table(title="how its blocks train")
    for column in ("backend", "pass here", "the written pass, by kind of block"):
        table.add_column(column, overflow="fold")
    for backend, choice in found["backends"].items():
        if "error" in choice:
            table.add_row(backend, "none", Text(choice["error"]))
            continue
        why = f" ({choice['why']})" if choice["why"] else ""
        table.add_row(backend, choice["uses"] + why, Text("\n".join(choice["blocks"])))
    console.print(table)
    if found["decoding"] is not None:
        console.print(f"greedy decoding is made of ops: the fused one {found['decoding']}", markup=False)


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
