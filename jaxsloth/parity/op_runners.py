"""Runs one case of one op on a backend or on its float64 reference: output and every gradient, as numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from jaxsloth.backend import BackendName, DtypeName
from jaxsloth.kernels.lora_dropout.contract import Masks
from jaxsloth.kernels.lora_matmul.contract import Dropout
from jaxsloth.kernels.nf4.contract import NF4, Nested
from jaxsloth.kernels.registry import Op, Target, resolve

# Each op's array arguments, and those that it is differentiated by.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lora_matmul": (("x", "lora_a", "lora_b", "bias"), ("x", "lora_a", "lora_b", "bias")),
    "lora_dropout": (("x", "a"), ("x", "a")),
    "rms_norm": (("x", "weight"), ("x", "weight")),
    "layer_norm": (("x", "weight", "bias"), ("x", "weight", "bias")),
    "rope": (("x", "cos", "sin"), ("x",)),
    "gated_activation": (("gate", "up"), ("gate", "up")),
    "attention": (("q", "k", "v", "q_segments", "kv_segments"), ("q", "k", "v")),
    "linear_cross_entropy": (("hidden", "weight", "targets"), ("hidden", "weight")),
}
# What stays float32 whatever the compute dtype: tables, adapters, and the gradient of a float32 loss.
_FLOAT32 = {"cos", "sin", "a", "lora_a", "lora_b"}

Result = dict[str, np.ndarray]


def part(op: str, name: str) -> Any:
    return import_module(f"jaxsloth.kernels.{op}.{name}")


def prepare(op: str, case: Any, dtype: DtypeName) -> dict[str, Any]:
    """The case's numpy inputs, rounded to the dtype that the op computes in, so that the reference sees the same values."""
    import ml_dtypes

    to = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    inputs = part(op, "cases").make_inputs(case, 0)
    keep = _FLOAT32 | ({"dy"} if op == "linear_cross_entropy" else set())
    return {
        name: value.astype(to) if value is not None and value.dtype == np.float32 and name not in keep else value
        for name, value in inputs.items()
    }


def options_of(case: Any) -> dict[str, Any]:
    return dict(getattr(case, "options", {}))


def quantized_base(case: Any, inputs: Mapping[str, Any]) -> NF4 | None:
    """A lora_matmul case's base as an NF4 of numpy arrays, quantized by plain torch; None where the base is dense."""
    if case.base == "dense":
        return None
    import torch

    from jaxsloth.kernels.nf4.torch_ops import quantize

    offset = inputs["offset"]
    found = quantize(
        torch.from_numpy(inputs["weight"].astype(np.float32)),
        nested=case.base == "nf4_nested",
        offset=None if offset is None else torch.from_numpy(np.asarray(offset, np.float32).reshape(())),
    )
    return map_nf4(lambda tensor: tensor.numpy(), found)


def map_nf4(function: Callable[[Any], Any], quantized: NF4) -> NF4:
    """The same weight with every array passed through `function`."""
    nested = quantized.nested
    if nested is not None:
        nested = Nested(function(nested.absmax), function(nested.offset), function(nested.code))
    return NF4(function(quantized.codes), function(quantized.absmax), nested, quantized.shape)


def run_reference(op: str, case: Any, inputs: Mapping[str, Any]) -> Result:
    """Output and gradients in float64, by autograd through the op's reference."""
    import torch

    names, wrt = ARGUMENTS[op]
    options = {name: value for name, value in options_of(case).items() if name != "chunk"}
    arrays: dict[str, Any] = {n: None if inputs[n] is None else torch.from_numpy(_wide(inputs[n])) for n in names}
    leaves = {n: arrays[n].requires_grad_() for n in wrt if arrays[n] is not None}
    if op == "lora_matmul":
        base = quantized_base(case, inputs)
        weight = torch.from_numpy(_wide(inputs["weight"]))
        if base is not None:
            weight = part("nf4", "reference").dequantize(map_nf4(torch.from_numpy, base))
        if case.dropout:
            words = (int(inputs["key"][0]), int(inputs["key"][1]))
            mask = part("dropout", "reference").keep_mask(
                words, inputs["rows"].tolist(), case.lead[1], case.in_, rate=case.dropout
            )
            options |= {"keep": torch.from_numpy(mask), "rate": case.dropout}
        output = part(op, "reference").lora_matmul(arrays.pop("x"), weight, **arrays, **options)
    elif op == "lora_dropout":
        output = part(op, "reference").lora_dropout(**arrays, **reference_masks(case, inputs))
    else:
        output = getattr(part(op, "reference"), op)(**arrays, **options)
    gradients = torch.autograd.grad(output, list(leaves.values()), torch.from_numpy(_wide(inputs["dy"])))
    named = {f"d{n}": g.numpy() for n, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach().numpy(), **named}


def run_torch(op: Op, case: Any, inputs: Mapping[str, Any], target: Target, requested: str | None = None) -> Result:
    """The torch backend's choice for `target`, on its device."""
    import torch

    def tensor(value: Any) -> Any:
        if value is None:
            return None
        if value.dtype.name == "bfloat16":
            return torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16).to(target.platform)
        if value.dtype == np.uint32:
            value = value.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape)).to(target.platform)

    names, wrt = ARGUMENTS[op.name]
    arrays = {n: tensor(inputs[n]) for n in names}
    leaves = {n: arrays[n].requires_grad_() for n in wrt if arrays[n] is not None}
    function = resolve(op, "torch", target, requested)
    output = _call(function, op.name, case, inputs, arrays, tensor)
    gradients = torch.autograd.grad(output, list(leaves.values()), tensor(inputs["dy"]).to(output.dtype))
    named = {f"d{n}": g.double().cpu().numpy() for n, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach().double().cpu().numpy(), **named}


def run_jax(op: Op, case: Any, inputs: Mapping[str, Any], target: Target, requested: str | None = None) -> Result:
    """The JAX backend's choice for `target`, jitted, on the default device."""
    import jax
    import jax.numpy as jnp

    def array(value: Any) -> Any:
        return None if value is None else jnp.asarray(value)

    names, wrt = ARGUMENTS[op.name]
    arrays = {n: array(inputs[n]) for n in names}
    leaves = {n: arrays[n] for n in wrt if arrays[n] is not None}
    function = resolve(op, "jax", target, requested)

    @jax.jit
    def both(leaves: dict[str, Any], dy: Any) -> Any:
        def forward(leaves: dict[str, Any]) -> Any:
            return _call(function, op.name, case, inputs, {**arrays, **leaves}, array)

        output, pull = jax.vjp(forward, leaves)
        return output, pull(dy.astype(output.dtype))[0]

    output, gradients = both(leaves, array(inputs["dy"]))
    named = {f"d{n}": np.asarray(g, np.float64) for n, g in gradients.items()}
    return {"output": np.asarray(output, np.float64), **named}


RUNNERS: dict[BackendName, Callable[..., Result]] = {"torch": run_torch, "jax": run_jax}


def _call(function: Any, op: str, case: Any, inputs: Mapping[str, Any], arrays: dict[str, Any], to_array: Any) -> Any:
    options = options_of(case)
    if op == "linear_cross_entropy" and function.__module__.endswith("xla_ops"):
        options["train_weight"] = True
    if op == "lora_dropout":
        return function(**arrays, masks=masks_of(case, inputs, to_array))
    if op != "lora_matmul":
        return function(**arrays, **options)
    base = quantized_base(case, inputs)
    weight = to_array(inputs["weight"]) if base is None else map_nf4(to_array, base)
    dropout = None
    if case.dropout:
        dropout = Dropout(case.dropout, to_array(inputs["key"]), to_array(inputs["rows"]))
    return function(arrays["x"], weight, arrays["lora_a"], arrays["lora_b"], bias=arrays["bias"], dropout=dropout, **options)


def masks_of(case: Any, inputs: Mapping[str, Any], to_array: Callable[[Any], Any]) -> Masks:
    """The masks of a lora_dropout case, as the implementations take them."""
    key, modules, rows = (to_array(inputs[name]) for name in ("key", "modules", "rows"))
    return Masks(case.rate, key, modules, case.ranks, rows, case.length, case.first)


def reference_masks(case: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same, as the reference takes them."""
    words = {name: tuple(inputs[name].tolist()) for name in ("key", "modules", "rows")}
    return {**words, "ranks": case.ranks, "length": case.length, "rate": case.rate, "first": case.first}


def _wide(value: np.ndarray) -> np.ndarray:
    return value if np.issubdtype(value.dtype, np.integer) else np.asarray(value, np.float64)
