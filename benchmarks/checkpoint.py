"""Writing a checkpoint of random weights that every contender can load: safetensors, config and a minimal tokenizer."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.shapes import RandomSource, shape_config, shape_spec
from jaxsloth.convert.files import whole_folder
from jaxsloth.models.names import tensor_shapes

_ROOM = 20 << 30
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0 to 3


def scratch_root() -> Path:
    """Memory-backed where there is such a place with room for an 8B model, so that no disk is measured."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > _ROOM:
        return shared
    return Path(tempfile.gettempdir())


def scratch_folder(asked: Path | None) -> Path:
    """Where checkpoints and workers' files go: kept between runs, so that a checkpoint is written once."""
    folder = asked or scratch_root() / "jaxsloth-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ensure_checkpoint(shape: str, root: Path) -> Path:
    """The folder of `shape`'s random bf16 checkpoint under `root`, written on first use, a shard a layer, by all cores."""
    folder = root / f"random-{shape}"
    if folder.is_dir():
        return folder
    spec = shape_spec(shape)
    groups: dict[str, list[str]] = {}
    for name in tensor_shapes(spec):
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else parts[-2], []).append(name)
    with whole_folder(folder, overwrite=False) as temporary:
        files = {name: f"model-{group}.safetensors" for group, names in groups.items() for name in names}
        workers = min(os.cpu_count() or 1, len(groups))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = [
                pool.submit(_write, shape, names, temporary / f"model-{group}.safetensors") for group, names in groups.items()
            ]
            total = sum(job.result() for job in jobs)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (temporary / "config.json").write_text(json.dumps(shape_config(shape), indent=2), encoding="utf-8")
        _write_tokenizer(temporary)
    return folder


def _write(shape: str, names: list[str], file: Path) -> int:
    """One safetensors file, written by hand: the library wants every tensor as bytes first, and touching that much fresh memory
    takes longer than writing it."""
    source, header, end = RandomSource(shape_spec(shape)), {}, 0
    for name in names:
        start, end = end, end + 2 * math.prod(source.shape(name))
        header[name] = {"dtype": "BF16", "shape": list(source.shape(name)), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as output:  # buffered: a raw write may stop short and say so in what it returns only
        output.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in source.pieces(name):
                output.write(piece.view(np.uint8).data)
    return end


def _write_tokenizer(folder: Path) -> None:
    added = [
        {
            "id": place,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for place, token in enumerate(SPECIAL)
    ]
    words = {token: place for place, token in enumerate((*SPECIAL, "a", "b", "c", "d"))}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": SPECIAL[0]},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[3],
        "model_max_length": 1 << 20,
        "padding_side": "right",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
