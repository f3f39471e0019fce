"""Checkpoints in bitsandbytes' 4 bits: NF4 with nested absmax, as transformers writes and loads it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from jaxsloth.backend import DtypeName
from jaxsloth.kernels.nf4.contract import BLOCK, CODE, NESTED_BLOCK, NF4


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


def bnb4bit_bytes(shape: tuple[int, ...]) -> int:
    """What a weight takes: codes, maxima of both levels, the code books and (at most) its state."""
    count = shape[0] * shape[1]
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 16 + 4 * 256 + 256
