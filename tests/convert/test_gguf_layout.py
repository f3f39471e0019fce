"""GGUF files whose tensors are not where, or what, the file says."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.safetensors_source import CheckpointError

WIDTH, LAYERS = 32, 2
FIELDS = {"block_count": LAYERS, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": WIDTH}


def write(path, freq_base=10000.0, extra=(), factors=None, **fields):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (FIELDS | fields).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(freq_base)
    names = [f"blk.{layer}.{part}" for layer in range(LAYERS) for part in ("attn_q", "attn_k", "attn_v", "attn_output")]
    names += [f"blk.{layer}.{part}" for layer in range(LAYERS) for part in ("ffn_gate", "ffn_up", "ffn_down")]
    for name in ("token_embd", *names, *extra):
        writer.add_tensor(f"{name}.weight", np.ones((WIDTH, WIDTH), np.float32))
    for name in ("output_norm", *(f"blk.{layer}.{part}" for layer in range(LAYERS) for part in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def moved(path, name, by):
    """The file, with a tensor's offset changed in the header: a name, its axes, its type, then the offset."""
    data = bytearray(path.read_bytes())
    start = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    axes = struct.unpack_from("<I", data, start)[0]
    place = start + 4 + 8 * axes + 4
    struct.pack_into("<Q", data, place, struct.unpack_from("<Q", data, place)[0] + by)
    path.write_bytes(data)
    return path


def test_a_whole_file_is_taken(tmp_path):
    assert len(open_checkpoint(write(tmp_path / "a.gguf")).spec().layers) == LAYERS
    factors = np.linspace(1, 4, 8)
    assert open_checkpoint(write(tmp_path / "b.gguf", factors=factors)).spec().layers[0].attention.rope.scaling is not None


@pytest.mark.parametrize(
    ("name", "by", "message"),
    [
        ("blk.0.ffn_up.weight", -4096, r"tensor blk\.0\.(ffn_up|ffn_gate)\.weight must begin after blk\.0\.\w+\.weight"),
        ("blk.0.ffn_up.weight", -32, r"tensor blk\.0\.ffn_up\.weight must begin after blk\.0\.ffn_gate\.weight"),
        ("blk.1.ffn_norm.weight", 1 << 20, "not a whole GGUF file"),
        ("blk.1.ffn_norm.weight", 4, r"(multiple of 32 bytes|not a whole GGUF file)"),
    ],
)
def test_tensors_that_lie_elsewhere(tmp_path, name, by, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(moved(write(tmp_path / "a.gguf"), name, by))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_count": 1}, r"no place for 9 of the checkpoint's tensors.*model\.layers\.1\."),
        ({"block_count": 3}, r"lacks model\.layers\.2\."),
        ({"embedding_length": 16}, r"embed_tokens\.weight must have the shape \(32, 16\) by config.json, got \(32, 32\)"),
        ({"extra": ["output_extra"]}, "output_extra.weight belongs to no known part"),
        ({"freq_base": 0.0}, r"llama\.rope\.freq_base"),
        ({"freq_base": float("nan")}, r"llama\.rope\.freq_base"),
        ({"factors": [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}, r"rope_freqs\.weight must hold positive numbers"),
    ],
)
def test_metadata_that_the_tensors_do_not_bear_out(tmp_path, fields, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path / "a.gguf", **fields)).spec()


def test_two_tensors_of_one_name(tmp_path):
    path = write(tmp_path / "a.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"))
    with pytest.raises(CheckpointError, match="duplicated tensor"):
        open_checkpoint(path)
