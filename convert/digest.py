"""What a checkpoint's weights are, in a few characters: cheap to form, and others where the weights are others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.checkpoint import Checkpoint
from jaxsloth.convert.safetensors_source import SafetensorsFile

_PAGE = 4096
_PAGES_OF_A_TENSOR = 16
_PAGES_OF_A_FILE = 8192
# Fields of config.json that say who wrote it, not what it computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def base_digest(opened: Checkpoint) -> str:
    """A digest of the config, of every tensor's name, dtype and shape, and of samples of its bytes: up to 16 pages of 4 KiB,
    evenly spaced, so that a tensor of up to 64 KiB counts whole. Neither the files' names nor their times count.

    16 GB in 291 tensors are 19 MB of reading: 0.35 s from a disk, 0.04 s from memory (two cores).
    A change of single weights of a large tensor may stay unseen.
    """
    digest = hashlib.blake2b(digest_size=16)
    config = {key: value for key, value in opened.config.items() if key not in _INCIDENTAL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    parts: dict[Any, list[tuple[Path, int, int, int]]] = {}
    for file in sorted({opened.source.file_of(name) for name in opened.source.names()}):
        if opened.kind in ("gguf", "pytorch"):
            size = file.stat().st_size
            parts.setdefault(size, []).append((file, 0, size, _PAGES_OF_A_FILE))
            continue
        for label, begin, size in SafetensorsFile(file).layout():
            parts[label] = [(file, begin, size, _PAGES_OF_A_TENSOR)]
    for label in sorted(parts):
        digest.update(repr(label).encode())
        for file, begin, size, pages in parts[label]:
            for sample in _samples(file, begin, size, pages):
                digest.update(sample)
    return digest.hexdigest()


def values_digest(values: Mapping[str, np.ndarray]) -> str:
    """A digest of every array's name, dtype, shape and samples of its bytes, as `base_digest` takes them of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        digest.update(repr((name, str(value.dtype), np.shape(values[name]))).encode())
        content = value.reshape(-1).view(np.uint8)
        for begin, size in _sampled(content.size, _PAGES_OF_A_TENSOR):
            digest.update(content[begin : begin + size].tobytes())
    return digest.hexdigest()


def _sampled(size: int, pages: int) -> list[tuple[int, int]]:
    """(first byte, bytes) of what counts of so many bytes."""
    if size <= pages * _PAGE:
        return [(0, size)]
    step = (size - _PAGE) / (pages - 1)
    return [(int(page * step), _PAGE) for page in range(pages)]


def _samples(file: Path, begin: int, size: int, pages: int) -> Iterator[bytes]:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for first, count in _sampled(size, pages):
            yield os.pread(descriptor, count, begin + first)
    finally:
        os.close(descriptor)
