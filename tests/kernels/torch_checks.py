"""One body an op, run for every torch implementation: against float64, from poisoned memory, twice."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

from jaxsloth.kernels.lora_matmul.contract import Dropout
from jaxsloth.kernels.nf4 import torch_ops as nf4_torch
from jaxsloth.kernels.nf4.reference import dequantize as reference_dequantize
from jaxsloth.kernels.tolerance import Tolerance
from jaxsloth.parity.op_runners import masks_of, reference_masks

DTYPES = ("float32", "bfloat16", "float16")
OPS = ("lora_matmul", "lora_dropout", "rms_norm", "layer_norm", "rope", "gated_activation", "attention", "linear_cross_entropy")
# Tensors by name; an optional one that a case leaves out is None.
Arrays = Mapping[str, Any]


def part(op: str, name: str) -> ModuleType:
    return importlib.import_module(f"jaxsloth.kernels.{op}.{name}")


def every_case(*ops: str) -> list[tuple[str, Any]]:
    return [(op, case) for op in ops for case in part(op, "cases").CASES]


def to_torch(inputs: Mapping[str, np.ndarray | None], device: str) -> dict[str, Any]:
    """Tensors of the same values; unsigned words become int64, which torch can compute with."""
    found: dict[str, Any] = {}
    for name, array in inputs.items():
        if array is not None and array.dtype == np.uint32:
            array = array.astype(np.int64)
        found[name] = None if array is None else torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape).to(device)
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN in here, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """``||got - expected|| / ||expected||``; where zeros are expected (a softmax over one key), the root mean square of `got`.

    Inputs are around 1, so rounding noise in place of a zero is held to the same bar as a relative error.
    """
    distance = (got.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    if size <= 1e-12:
        return distance / max(expected.numel(), 1) ** 0.5
    return distance / size


def differentiate(
    function: Callable[[Arrays], torch.Tensor], inputs: Arrays, wrt: tuple[str, ...], dy: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output and the gradients with respect to `wrt` where ``dy`` comes in."""
    leaves = {
        name: value.detach().clone().requires_grad_() for name, value in inputs.items() if name in wrt and value is not None
    }
    output = function({**inputs, **leaves})
    gradients = torch.autograd.grad(output, list(leaves.values()), dy.to(output.dtype))
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def check(
    function: Callable[[Arrays], torch.Tensor],
    reference: Callable[[Arrays], torch.Tensor],
    inputs: Arrays,
    wrt: tuple[str, ...],
    tolerance: Tolerance,
) -> None:
    """`function` agrees with `reference` on the float64 values of the same inputs, and with itself on a second run."""
    dy = inputs["dy"]
    with poisoned():
        output, gradients = differentiate(function, inputs, wrt, dy)
        again, gradients_again = differentiate(function, inputs, wrt, dy)
    doubles = {name: v.double() if v is not None and v.is_floating_point() else v for name, v in inputs.items()}
    expected, expected_gradients = differentiate(reference, doubles, wrt, dy.double())
    assert output.shape == expected.shape
    assert torch.equal(output, again)
    assert relative_error(output, expected) <= tolerance.output, f"output: {relative_error(output, expected):.2e}"
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype and gradient.shape == expected_gradients[name].shape
        assert torch.equal(gradient, gradients_again[name]), f"d{name} changes from run to run"
        error = relative_error(gradient, expected_gradients[name])
        assert error <= tolerance.gradient, f"d{name}: {error:.2e}"


def prepare(op: str, case: Any, dtype: str, device: str, seed: int = 0) -> dict[str, Any]:
    """The case's inputs as tensors; all but tables, adapters and the loss's gradient in `dtype`."""
    inputs = to_torch(part(op, "cases").make_inputs(case, seed), device)
    wide = {"cos", "sin", "inverse_frequencies", "a", "lora_a", "lora_b", "offset"}
    if op == "linear_cross_entropy":
        wide.add("dy")
    to = getattr(torch, dtype)
    return {name: v.to(to) if v is not None and v.is_floating_point() and name not in wide else v for name, v in inputs.items()}


def check_op(op: str, function: Callable[..., torch.Tensor], case: Any, dtype: str, device: str) -> None:
    """The whole check of one implementation of `op` on one case."""
    tolerance = part(op, "contract").TOLERANCES[dtype]
    inputs = prepare(op, case, dtype, device)
    reference = getattr(part(op, "reference"), op)
    if op == "lora_matmul":
        check_lora_matmul(function, reference, case, inputs, tolerance)
        return
    if op == "lora_dropout":
        masks, words = masks_of(case, inputs, lambda value: value), reference_masks(case, inputs)
        check(
            lambda arrays: function(arrays["x"], arrays["a"], masks),
            lambda arrays: reference(arrays["x"], arrays["a"], **words),
            inputs,
            ("x", "a"),
            tolerance,
        )
        return
    arguments, wrt = {
        "rms_norm": (("x", "weight"), ("x", "weight")),
        "layer_norm": (("x", "weight", "bias"), ("x", "weight", "bias")),
        "rope": (("x", "cos", "sin"), ("x",)),
        "gated_activation": (("gate", "up"), ("gate", "up")),
        "attention": (("q", "k", "v", "q_segments", "kv_segments"), ("q", "k", "v")),
        "linear_cross_entropy": (("hidden", "weight", "targets"), ("hidden", "weight")),
    }[op]
    options = getattr(case, "options", {})
    in_reference = {name: value for name, value in options.items() if name != "chunk"}

    def run(arrays: Arrays) -> torch.Tensor:
        output = function(**{name: arrays[name] for name in arguments}, **options)
        assert output.dtype == (torch.float32 if op == "linear_cross_entropy" else getattr(torch, dtype))
        return output

    check(run, lambda arrays: reference(**{name: arrays[name] for name in arguments}, **in_reference), inputs, wrt, tolerance)


def check_lora_matmul(
    function: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    case: Any,
    inputs: dict[str, Any],
    tolerance: Tolerance,
) -> None:
    base: Any = inputs.pop("weight")
    dense = base.double()
    if case.base != "dense":
        base = nf4_torch.quantize(base, nested=case.base == "nf4_nested", offset=inputs["offset"])
        dense = reference_dequantize(base)
    dropout, keep = None, None
    if case.dropout:
        key, rows = inputs["key"], inputs["rows"]
        dropout = Dropout(case.dropout, key, rows)
        words = tuple(key.tolist())
        mask = part("dropout", "reference").keep_mask(words, rows.tolist(), case.lead[1], case.in_, rate=case.dropout)
        keep = torch.from_numpy(mask).to(dense.device)
    names = ("x", "lora_a", "lora_b")
    check(
        lambda a: function(a["x"], base, a["lora_a"], a["lora_b"], bias=a["bias"], dropout=dropout, **case.options),
        lambda a: reference(
            a["x"], dense, a["lora_a"], a["lora_b"], bias=a["bias"], keep=keep, rate=case.dropout, **case.options
        ),
        inputs,
        (*names, "bias"),
        tolerance,
    )


def check_matvec(function: Callable[..., torch.Tensor], case: Any, dtype: str, nested: bool, device: str) -> None:
    """Against float64, from poisoned memory, twice."""
    inputs = to_torch(part("nf4", "cases").make_matvec_inputs(case, 0), device)
    weights = [nf4_torch.quantize(inputs[f"weight{place}"], nested=nested) for place in range(len(case.outs))]
    x = inputs["x"].to(getattr(torch, dtype))
    if case.strided:
        lead = int(nested)  # rows that begin between two words, and are no whole number of them
        gap = torch.full_like(x[:, : 40 + lead], float("nan"))
        x = torch.cat([gap[:, :lead], x, gap[:, lead:]], dim=1)[:, lead : lead + case.in_]
    bias = None if inputs["bias"] is None else inputs["bias"].to(x.dtype)
    with poisoned():
        got, again = function(x, weights, bias), function(x, weights, bias)
    expected = part("nf4", "reference").matvec(x.double(), weights, None if bias is None else bias.double())
    assert got.dtype == x.dtype and got.shape == (case.rows, sum(case.outs))
    assert torch.equal(got, again)
    error, tolerance = relative_error(got, expected), part("nf4", "contract").MATVEC_TOLERANCES[dtype]
    assert error <= tolerance.output, f"{error:.2e}"


def check_cached_attention(module: ModuleType, case: Any, dtype: str, device: str) -> None:
    """`append` and `attend` of one token, against the rotation and the attention of the whole by their definitions."""
    inputs = to_torch(part("attention", "cases").make_cached_inputs(case, 0), device)
    data = {name: inputs[name].to(getattr(torch, dtype)) for name in ("q", "k", "v", "keys", "values")}
    q, k, v, keys, values = (data[name].clone() for name in ("q", "k", "v", "keys", "values"))
    # In one buffer, as a projection leaves them.
    q, k, v = torch.cat([q, k, v], dim=1).split([q.shape[1], k.shape[1], v.shape[1]], dim=1)
    tables = None if case.half is None else (inputs["cos"], inputs["sin"])
    with poisoned():
        module.append(q, k, v, tables, keys, values, inputs["slot"])
        found = [
            module.attend(
                q,
                keys,
                values,
                inputs["first"],
                inputs["slot"],
                scale=case.head_dim**-0.5,
                window=case.window,
                soft_cap=case.soft_cap,
            )
            for _ in range(2)
        ]
    # The library's attention under a mask may sum in another order each time.
    judge_cached_attention(case, dtype, inputs, data, (q, keys, values), found, module.__name__.endswith("triton_kernel"))


def judge_cached_attention(
    case: Any, dtype: str, inputs: Arrays, data: Arrays, appended: Any, found: Any, repeats: bool
) -> None:
    """What `append` left (q, keys, values) and `attend` said twice. inputs: the case's; data: what of it went in, in `dtype`;
    repeats: twice the same must come to the same bits."""
    q, keys, values = appended
    batch, options = len(case.firsts), {"window": case.window, "soft_cap": case.soft_cap}
    turned = [data["q"], data["k"]]
    if case.half is not None:
        tables = [inputs[name].to(data["q"].dtype).double()[:, None] for name in ("cos", "sin")]
        rope = part("rope", "reference").rope
        turned = [rope(t.double().view(batch, 1, -1, case.head_dim), *tables).view(batch, -1) for t in turned]
    shape = (batch, case.kv_heads, case.head_dim)
    others = torch.arange(case.capacity, device=q.device) != case.slot
    for cache, before, new in ((keys, data["keys"], turned[1]), (values, data["values"], data["v"])):
        assert torch.equal(cache[:, others], before[:, others])
        assert relative_error(cache[:, case.slot], new.view(shape)) <= part("rope", "contract").TOLERANCES[dtype].output
    seen = (torch.arange(case.capacity)[None] >= inputs["first"].cpu()[:, None]).int()
    expected = part("attention", "reference").attention(
        q.cpu().double().reshape(batch, 1, -1, case.head_dim),
        keys.cpu().double(),
        values.cpu().double(),
        scale=case.head_dim**-0.5,
        q_segments=torch.ones(batch, 1, dtype=torch.int32),
        kv_segments=seen,
        q_offset=case.slot,
        **options,
    )
    assert found[0].dtype == q.dtype
    if repeats:
        assert torch.equal(*found)
    else:
        assert relative_error(*found) <= part("attention", "contract").TOLERANCES[dtype].output
    assert relative_error(q, turned[0]) <= part("rope", "contract").TOLERANCES[dtype].output
    error = relative_error(found[0].cpu(), expected.view(batch, -1))
    assert error <= part("attention", "contract").TOLERANCES[dtype].output, f"{error:.2e}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, so that NaN and the sign of zero count."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def check_dequantize(
    function: Callable[..., torch.Tensor],
    case: Any,
    dtype: str,
    nested: bool,
    device: str,
    round_to: Callable[[torch.Tensor, torch.dtype], torch.Tensor] = torch.Tensor.to,
) -> None:
    """Bit-equal with plain torch (which is bit-equal with bitsandbytes) in float32, rounded by `round_to`."""
    inputs = to_torch(part("nf4", "cases").make_inputs(case, 0), device)
    quantized = nf4_torch.quantize(inputs["weight"], nested=nested, offset=inputs["offset"] if nested else None)
    to = getattr(torch, dtype)
    with poisoned():
        got = function(quantized, to)
    assert got.shape == (case.out, case.in_)
    assert got.dtype == to
    assert torch.equal(bits(got), bits(round_to(nf4_torch.dequantize(quantized, torch.float32), to)))
