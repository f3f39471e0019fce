"""GGUF files (llama.cpp's), dequantized to float32 under Hugging Face names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.gguf_config import open_gguf, read_fields
from jaxsloth.convert.gguf_fields import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from jaxsloth.convert.safetensors_source import CheckpointError

# Tensors that hold no weight of the model: `gguf_config` turns these factors into the config's rope scaling.
_DERIVED = {ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS}


class GgufSource:
    """A GGUF file as a TensorSource. Blocks of any ggml type that the gguf package knows are dequantized when read."""

    def __init__(self, path: Path) -> None:
        self._reader = open_gguf(path)
        _check_layout(self._reader, path)
        self.path = path
        self._family, fields = read_fields(self._reader, path)
        heads = {"q_proj": fields.head_count, "k_proj": fields.head_count_kv or fields.head_count}
        self._heads = heads if self._family.permuted else {}
        self._tensors = {self._family.hf_name(t.name, path): t for t in self._reader.tensors if t.name not in _DERIVED}

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))  # ggml counts from the fastest axis

    def read(self, name: str) -> np.ndarray:
        """float32, a fresh array."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(self.shape(name))
        if self._family.norm_offset and self._family.is_norm(name):
            return value - np.float32(self._family.norm_offset)
        projection = name.split(".")[-2]
        return unpermute(value, self._heads[projection]) if projection in self._heads else value

    def block_type(self, name: str) -> str:
        """The ggml type of a tensor's blocks."""
        return str(self._tensors[name].tensor_type.name)

    def tokens(self) -> int:
        """How many tokens the file's vocabulary has: rows of the embedding."""
        return self.shape("model.embed_tokens.weight")[0]

    def file_type(self) -> int | None:
        """general.file_type: llama.cpp's number of the kind of file, where it says one."""
        field = self._reader.fields.get("general.file_type")
        return None if field is None else int(field.contents())

    def tokenizer_fields(self) -> dict[str, Any]:
        """The file's own tokenizer metadata, for another GGUF file of the same model."""
        return {name: field.contents() for name, field in self._reader.fields.items() if name.startswith("tokenizer.")}

    def file_of(self, name: str) -> Path:
        del name
        return self.path

    def stored_as(self, name: str) -> str:
        """Blocks are dequantized to this."""
        del name
        return "F32"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k rows: it interleaves the two rotary halves of each head (pairs of neighbours
    rotate), Hugging Face keeps them apart (channel i rotates with i + head_dim / 2)."""
    half = weight.shape[0] // heads // 2
    return np.ascontiguousarray(weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2)).reshape(weight.shape)


def _check_layout(reader: Any, path: Path) -> None:
    """That every tensor has bytes of its own, inside the file, where the file's alignment puts them."""
    end, before = int(reader.data_offset), "the header"
    size = path.stat().st_size
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset)
        if start < end:
            raise CheckpointError(f"{path}: tensor {tensor.name} must begin after {before}, at byte {end}, got {start}")
        if (start - int(reader.data_offset)) % int(reader.alignment):
            raise CheckpointError(f"{path}: tensor {tensor.name} must begin at a multiple of {reader.alignment} bytes")
        end, before = start + int(tensor.n_bytes), tensor.name
        if end > size:
            raise CheckpointError(f"{path}: tensor {tensor.name} must end in the file's {size} bytes, got {end}")
