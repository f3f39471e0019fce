"""Merged checkpoints in bitsandbytes' 4 bits: NF4 with nested absmax, as transformers writes and loads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.backend import DtypeName, TensorSource
from jaxsloth.convert.merge import write_merged
from jaxsloth.convert.safetensors_writer import SHARD_BYTES
from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4
from jaxsloth.models.names import linears
from jaxsloth.models.spec import ModelSpec

PARTS = 6  # tensors that a quantized weight is stored as


def write_bnb4bit(
    folder: Path,
    source: TensorSource,
    spec: ModelSpec,
    values: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    dtype: DtypeName,
    *,
    quantize: Callable[[np.ndarray], NF4],
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`write_merged`, with every linear layer of the blocks merged in float32 and then quantized; the rest in `dtype`.

    Args:
        quantize: float32 ``[out, in]`` -> nested NF4 of arrays that numpy reads.

    Raises:
        ExistsError: the folder exists and overwrite is False.
        ValueError: values do not fit the spec.
    """
    quantized = {f"{linear.name}.weight" for linear in linears(spec)}

    def store(name: str, tensor: np.ndarray) -> dict[str, np.ndarray] | None:
        return bnb4bit_parts(name, quantize(np.ascontiguousarray(tensor, np.float32)), dtype) if name in quantized else None

    described = dict(config) | {"quantization_config": bnb4bit_config(dtype)}
    write_merged(folder, source, spec, values, described, dtype, overwrite=overwrite, shard_bytes=shard_bytes, store=store)


def bnb4bit_config(dtype: DtypeName) -> dict[str, Any]:
    """config.json's quantization_config of such a checkpoint, which computes in `dtype`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


def bnb4bit_parts(name: str, nf4: NF4, dtype: DtypeName) -> dict[str, np.ndarray]:
    """bitsandbytes' tensors of one weight: codes, maxima, code books, and the scalars as JSON in a uint8 tensor."""
    assert nf4.nested is not None
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": list(nf4.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": float(nf4.nested.offset),
    }
    return {
        name: np.asarray(nf4.codes).reshape(-1, 1),
        f"{name}.absmax": np.asarray(nf4.absmax),
        f"{name}.quant_map": CODE,
        f"{name}.nested_absmax": np.asarray(nf4.nested.absmax),
        f"{name}.nested_quant_map": np.asarray(nf4.nested.code),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
