"""L0: the NF4 format, bit for bit: bitsandbytes against each backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxsloth.backend import BACKENDS, BackendName
from jaxsloth.kernels.nf4.contract import DEQUANTIZE, QUANTIZE
from jaxsloth.kernels.registry import Target, resolve
from jaxsloth.models.names import layer_linears
from jaxsloth.parity import bars
from jaxsloth.parity.measure import Measurement
from jaxsloth.parity.subjects import Subjects

RUNG = "L0"


def measure(subjects: Subjects) -> Iterator[Measurement]:
    """Every linear weight of the first, middle and last layer, plain and nested."""
    count = len(subjects.spec.layers)
    names = [f"{linear.name}.weight" for i in sorted({0, count // 2, count - 1}) for linear in layer_linears(subjects.spec, i)]
    for backend in BACKENDS:
        for nested in (False, True):
            yield from _measure_backend(subjects, backend, names, nested)


def _measure_backend(subjects: Subjects, backend: BackendName, names: list[str], nested: bool) -> Iterator[Measurement]:
    differing = {"codes": 0, "absmax": 0, "dequantized": 0}
    offset_error, elements = 0.0, 0
    for name in names:
        weight = np.asarray(subjects.checkpoint.source.read(name), dtype=np.float32)
        elements += weight.size
        judge = _bitsandbytes(weight, nested)
        ours = _quantize(backend, weight, nested, judge["offset"])
        for part in differing:
            differing[part] += int(np.count_nonzero(ours[part] != judge[part]))
        if nested:
            own = _quantize(backend, weight, nested, None)["offset"]
            offset_error = max(offset_error, abs(float(own) - float(judge["offset"])) / abs(float(judge["offset"])))
    label = f"{backend} vs bitsandbytes{', nested' if nested else ''}"
    note = f"{elements:,} weights"
    for part, value in differing.items():
        yield Measurement(RUNG, f"{label}: differing {part}", value, bars.L0_DIFFERING_ELEMENTS, note=note)
    if nested:
        yield Measurement(RUNG, f"{label}: offset, relative", offset_error, bars.L0_OFFSET_RELATIVE)


def _bitsandbytes(weight: np.ndarray, nested: bool) -> dict[str, Any]:
    import torch
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(torch.from_numpy(weight), compress_statistics=nested, quant_type="nf4")
    offset = None if state.offset is None else state.offset.numpy()
    return {
        "codes": codes.numpy().reshape(-1),
        "absmax": state.absmax.numpy(),
        "offset": offset,
        "dequantized": functional.dequantize_4bit(codes, state).numpy(),
    }


def _quantize(backend: BackendName, weight: np.ndarray, nested: bool, offset: np.ndarray | None) -> dict[str, Any]:
    """The backend's own quantize and dequantize, its arrays brought to numpy."""
    target = Target(platform="cpu")
    if backend == "torch":
        import torch

        array, to_numpy, dtype = torch.from_numpy, lambda t: t.numpy(), torch.float32
    else:
        import jax.numpy as jnp

        array, to_numpy, dtype = jnp.asarray, np.asarray, jnp.float32
    given = None if offset is None else array(np.asarray(offset, np.float32))
    quantized = resolve(QUANTIZE, backend, target)(array(weight), nested=nested, offset=given)
    return {
        "codes": to_numpy(quantized.codes).reshape(-1),
        "absmax": to_numpy(quantized.absmax),
        "offset": to_numpy(quantized.nested.offset) if nested else None,
        "dequantized": to_numpy(resolve(DEQUANTIZE, backend, target)(quantized, dtype)),
    }
