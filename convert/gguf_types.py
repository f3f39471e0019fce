"""Which ggml type each tensor of a GGUF file is stored as, and the blocks themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from jaxsloth.convert.fitting import Clamped, check_cast, clamp_rows, not_numbers

# Of the rows of a K-quant, what must divide them; of the older blocks.
SUPER_BLOCK, BLOCK = 256, 32
# Parts whose type may differ from the rest.
_PARTS = ("attn_v", "attn_qkv", "attn_output", "ffn_down", "output", "token_embd", "ffn_up")
_NATIVE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
# What a row that no super-block divides is stored as instead: llama.cpp's rule.
_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


Rule = Callable[[str, int, int, int], str]


@dataclass(frozen=True)
class OutType:
    """A kind of file: its name, llama.cpp's number for it (general.file_type), and each tensor's type.

    tensor_type: (part, layer, layers, groups) -> a ggml type's name; part: "attn_v", "ffn_down", "output", "token_embd", …;
    groups: query heads a key and value head.
    """

    name: str
    file_type: int
    tensor_type: Rule

    @property
    def needs_libgguf(self) -> bool:
        kinds = {self.tensor_type(part, layer, 32, 1) for part in _PARTS for layer in range(32)}
        return not kinds <= set(_NATIVE)


def _all(kind: str) -> Rule:
    return lambda part, layer, layers, groups: kind


def _mixed(kind: str, head: str = "Q6_K") -> Rule:
    """One kind throughout but for the head, which every token reads."""
    return lambda part, layer, layers, groups: head if part == "output" else kind


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _medium(kind: str, fused: str) -> Rule:
    """Q4_K_M and Q5_K_M: values and down projections of some layers, and the head, in 6 bits; fused: of queries, keys and
    values in one tensor."""

    def tensor_type(part: str, layer: int, layers: int, groups: int) -> str:
        if part == "output" or (part in ("attn_v", "ffn_down") and more_bits(layer, layers)):
            return "Q6_K"
        return fused if part == "attn_qkv" else kind

    return tensor_type


def _q4_k_s(part: str, layer: int, layers: int, groups: int) -> str:
    if part == "output":
        return "Q6_K"
    wide = (part == "attn_v" and layer < 4) or (part == "ffn_down" and layer < layers // 8)
    return "Q5_K" if wide else "Q4_K"


def _q3_k_m(part: str, layer: int, layers: int, groups: int) -> str:
    if part == "output":
        return "Q6_K"
    if part == "attn_v":
        return "Q5_K" if layer < 2 else "Q4_K"
    if part == "ffn_down":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    return "Q4_K" if part in ("attn_output", "attn_qkv") else "Q3_K"


def _q2_k(part: str, layer: int, layers: int, groups: int) -> str:
    if part == "output":
        return "Q6_K"
    if part == "attn_v":
        return "Q4_K" if groups >= 4 else "Q3_K"
    return "Q3_K" if part in ("ffn_down", "attn_output") else "Q2_K"


def _iq4(kind: str) -> Rule:
    """IQ4_NL and IQ4_XS: 5 bits for shared values and the first down projections."""

    def tensor_type(part: str, layer: int, layers: int, groups: int) -> str:
        if part == "output":
            return "Q6_K"
        wide = (part == "attn_v" and groups >= 4) or (part == "ffn_down" and layer < layers // 8)
        return "Q5_K" if wide else kind

    return tensor_type


OUT_TYPES = {
    kind.name: kind
    for kind in (
        OutType("f32", 0, _all("F32")),
        OutType("f16", 1, _all("F16")),
        OutType("bf16", 32, _all("BF16")),
        OutType("q8_0", 7, _all("Q8_0")),
        OutType("q4_0", 2, _all("Q4_0")),
        OutType("q4_1", 3, _all("Q4_1")),
        OutType("q5_0", 8, _all("Q5_0")),
        OutType("q5_1", 9, _all("Q5_1")),
        OutType("q2_k", 10, _q2_k),
        OutType("q3_k_m", 12, _q3_k_m),
        OutType("q4_k_s", 14, _q4_k_s),
        OutType("q4_k_m", 15, _medium("Q4_K", "Q5_K")),
        OutType("q5_k_s", 16, _mixed("Q5_K")),
        OutType("q5_k_m", 17, _medium("Q5_K", "Q6_K")),
        OutType("q6_k", 18, _mixed("Q6_K")),
        OutType("iq4_nl", 25, _iq4("IQ4_NL")),
        OutType("iq4_xs", 30, _iq4("IQ4_XS")),
    )
}


def fitting_type(kind: str, row: int) -> str:
    """`kind`, or what rows of this many values are stored as instead."""
    if kind in _FALLBACK and row % SUPER_BLOCK:
        kind = _FALLBACK[kind]
    return "F16" if kind not in ("F32", "F16", "BF16") and row % BLOCK else kind


def check_available(kind: OutType) -> None:
    """ValueError where the package that forms a kind's blocks is not installed."""
    if kind.needs_libgguf and find_spec("libgguf") is None:
        raise ValueError(f"{kind.name} needs the package libgguf; run: pip install 'jaxsloth[gguf]'")


_VALUES_A_THREAD = 1 << 18
_AT_ONCE = 1 << 22  # values that a core has in float32 at a time
_LARGEST = float(np.finfo(np.float16).max)  # of values in blocks, whose scales are float16


def encode(value: np.ndarray, kind: str, name: str = "to encode", clamped: Clamped | None = None) -> np.ndarray:
    """Floats ``[rows, columns]`` of any dtype as ggml's bytes, uint8 ``[rows, bytes]`` (F32 and F16 as themselves).

    Beyond the result it takes float32 temporaries of some rows.

    Raises:
        CheckpointError: values of the tensor `name` are too large for F16 or for blocks' scales (where `clamped` is given they
            are counted there instead), or are no numbers there.
    """
    from gguf import GGMLQuantizationType

    if kind in ("F32", "F16"):
        return np.ascontiguousarray(check_cast(name, value, np.dtype(np.float32 if kind == "F32" else np.float16), clamped))
    number = GGMLQuantizationType[kind]
    if find_spec("libgguf") is not None and kind != "BF16":
        from libgguf import quantize_rows as quantize
    else:
        from gguf.quants import quantize

    rows = value.reshape(-1, value.shape[-1])
    found = np.empty((len(rows), stored_bytes(kind, rows.shape[1:])), np.uint8)

    def encode_rows(start: int) -> None:
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        if kind != "BF16":
            part = _fitting_blocks(part, kind, name, clamped)
        found[start : start + step] = quantize(part, number)

    parts = min(os.cpu_count() or 1, value.size // _VALUES_A_THREAD, len(rows))
    step = max(1, min(_AT_ONCE // rows.shape[1], -(-len(rows) // max(1, parts))))
    starts = range(0, len(rows), step)
    if parts < 2:
        for start in starts:
            encode_rows(start)
    else:
        with ThreadPoolExecutor(parts) as threads:  # libgguf's calls leave Python's lock
            list(threads.map(encode_rows, starts))
    return found.reshape(*value.shape[:-1], -1)


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """What a tensor takes as a ggml type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def _fitting_blocks(part: np.ndarray, kind: str, name: str, clamped: Clamped | None) -> np.ndarray:
    low, high = part.min(), part.max()
    if low >= -_LARGEST and high <= _LARGEST:
        return part
    if not np.isfinite((low, high)).all():
        raise not_numbers(name, kind)
    return clamp_rows(name, part, _LARGEST, f"the float16 scales of {kind}", clamped)
