"""The sizes that each op has in a real model, as cases of the op's own cases.py, and the op bound to them on a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.shapes import shape_spec
from jaxsloth.backend import BackendName, DtypeName
from jaxsloth.kernels.nf4.contract import QUANTIZE
from jaxsloth.kernels.registry import Op, Target, resolve
from jaxsloth.models.names import layer_linears
from jaxsloth.parity.op_runners import ARGUMENTS, masks_of, options_of, part, prepare

# By what a training step differentiates an op, where that is less than what it could be: the base's own weights are frozen.
TRAINED = {
    "rms_norm": ("x",),
    "layer_norm": ("x",),
    "linear_cross_entropy": ("hidden",),
    "lora_matmul": ("x", "lora_a", "lora_b"),
}


@dataclass(frozen=True)
class Bound:
    """An implementation on its arguments: ``forward(arrays)``, differentiated by the arrays that `wrt` names."""

    forward: Callable[[dict[str, Any]], Any]
    arrays: dict[str, Any]
    wrt: tuple[str, ...] = ()
    dy: Any = None
    jit: bool = True  # JAX's quantize takes its reciprocals on the host (docs/decisions.md)


def real_cases(op: str, shape: str, batch: int, length: int) -> Iterator[Any]:
    """The cases of `op` (by name) in a step of a model of `shape`; none for an op that this file does not know."""
    spec, tokens = shape_spec(shape), batch * length
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
    linears = {linear.name.rpartition(".")[2]: linear for linear in layer_linears(spec, 0)}
    chosen = [linears[name] for name in ("q_proj", "gate_proj", "down_proj")]
    names = [linear.name.rpartition(".")[2] for linear in chosen]
    if op in ("nf4_quantize", "nf4_dequantize"):
        case = part("nf4", "cases").Case
        yield from (case(n, linear.out_features, linear.in_features) for n, linear in zip(names, chosen, strict=True))
    elif op == "lora_matmul":
        case = part(op, "cases").Case
        for n, linear in zip(names, chosen, strict=True):
            yield case(n, (batch, length), linear.in_features, linear.out_features, rank=16, base="nf4_nested", scale=1.0)
        linear = linears["q_proj"]
        yield case("decode", (1, 1), linear.in_features, linear.out_features, rank=0, base="nf4_nested")
    elif op == "lora_dropout":
        case, rows = part(op, "cases").Case, tuple(range(batch))
        for n, linear, members in zip(names, chosen, (3, 2, 1), strict=True):
            yield case(n, rows, length, linear.in_features, (16,) * members, rate=0.05)
    elif op in ("rms_norm", "layer_norm"):
        yield part(op, "cases").Case("hidden", (batch, length), spec.hidden)
    elif op == "rope":
        yield part(op, "cases").Case("queries", batch, length, heads, size, size, theta=500000.0)
    elif op == "gated_activation":
        yield part(op, "cases").Case("silu", (batch, length), mlp.width)
    elif op == "attention":
        case = part(op, "cases").Case
        yield case("causal", batch, length, heads, kv_heads, size)
        yield case("window", batch, length, heads, kv_heads, size, window=max(length // 4, 1))
        yield case("padded", batch, length, heads, kv_heads, size, segments="right")
        yield case("soft_cap", batch, length, heads, kv_heads, size, soft_cap=50.0)
    elif op == "linear_cross_entropy":
        yield part(op, "cases").Case("head", tokens, spec.hidden, spec.embedding.vocab, ignored="none")


def bind(
    op: Op, backend: BackendName, target: Target, implementation: str, case: Any, to_device: Callable[[np.ndarray], Any]
) -> Bound:
    """The implementation, by name, on the case's arrays, put on the device by `to_device`.

    Raises:
        RefusedError: it can't run here; the reason.
    """
    function = resolve(op, backend, target, implementation)
    dtype: DtypeName = target.dtype  # type: ignore[assignment]
    quantize = resolve(QUANTIZE, backend, Target(target.platform))
    if op.name in ("nf4_quantize", "nf4_dequantize"):
        weight = to_device(part("nf4", "cases").make_inputs(case, 0)["weight"])
        if op.name == "nf4_quantize":
            return Bound(lambda arrays: function(arrays["weight"], nested=True), {"weight": weight}, jit=False)
        out_dtype = _dtype(backend, dtype)
        return Bound(lambda arrays: function(arrays["base"], out_dtype), {"base": quantize(weight, nested=True)})
    inputs = prepare(op.name, case, dtype)
    names, differentiable = ARGUMENTS[op.name]
    arrays = {name: to_device(inputs[name]) for name in names if inputs[name] is not None}
    if op.name == "lora_matmul":
        arrays["base"] = quantize(to_device(inputs["weight"].astype(np.float32)), nested=True)
    wrt = tuple(name for name in TRAINED.get(op.name, differentiable) if name in arrays)
    options = options_of(case)
    if op.name == "lora_dropout":
        words = np.int64 if backend == "torch" else np.uint32
        options["masks"] = masks_of(case, inputs, lambda a: to_device(a.astype(words) if a.dtype == np.uint32 else a))
    return Bound(lambda arrays: function(**arrays, **options), arrays, wrt, to_device(inputs["dy"]))


def _dtype(backend: BackendName, name: DtypeName) -> Any:
    if backend == "torch":
        import torch

        return getattr(torch, name)
    import jax.numpy as jnp

    return jnp.dtype(name)
