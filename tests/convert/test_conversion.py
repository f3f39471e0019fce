"""``jaxsloth convert``: each format judged by its own ecosystem's reader, and round trips to the bit."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quant_shape_to_byte_shape
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxsloth import cli
from jaxsloth.convert import gguf_types
from jaxsloth.convert.check import check
from jaxsloth.convert.checkpoint import described_model, open_checkpoint
from jaxsloth.convert.files import ExistsError, WriteError, parse_size
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.convert.report import describe
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.names import trainable_shapes
from jaxsloth.parity.subjects import SMOLLM2
from jaxsloth.training.state_formats import convert_state
from jaxsloth.transforms import add_lora
from tests.support.small_models import LLAMA3
from tests.support.tiny import random_weights, with_merge, write_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"


def run(source, destination, to, **options):
    return convert(plan(str(source), destination, to, Options(**options)))


def tensors(folder):
    source = open_checkpoint(folder).source
    return {name: np.asarray(source.read(name)) for name in source.names()}


def checkpoint(folder, **changes):
    return with_merge(write_checkpoint(folder, **changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3}], ids=["", "tied", "llama3"]
)
def test_gguf_and_back_to_the_bit(changes, tmp_path):
    """llama.cpp's order of q and k rows and its names are undone; Llama 3's scaling comes back as the same frequencies."""
    folder = checkpoint(tmp_path / "model", **changes)
    file = run(folder, tmp_path / "model.gguf", "gguf", outtype="f32")
    back = run(file, tmp_path / "back", "hf", dtype="float32")
    before, after = tensors(folder), tensors(back)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(value, after[name]), name
    ids = torch.arange(40)[None] % 260
    with torch.no_grad():
        want, got = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, back))
    assert (want - got).abs().max() < 2e-6 * want.abs().max()
    text = "Hello  world 1234 ümlaut 漢字 😀"
    assert AutoTokenizer.from_pretrained(back)(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids


def ggmls_blocks(value, kind):
    """What llama.cpp itself forms of float32 rows: its library in xllamacpp's wheel, called past the wheel's bindings."""
    form = ctypes.CDLL(find_spec("xllamacpp.xllamacpp").origin).ggml_quantize_chunk  # type: ignore[union-attr]
    form.argtypes, form.restype = (
        [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p],
        ctypes.c_size_t,
    )
    blocks = np.zeros(quant_shape_to_byte_shape(value.shape, kind), np.uint8)
    assert form(int(kind), value.ctypes.data, blocks.ctypes.data, 0, *value.shape, None) == blocks.nbytes
    return blocks


@pytest.mark.parametrize(
    ("outtype", "up", "values", "down", "head"),
    [
        ("q8_0", "Q8_0", ["Q8_0"] * 4, ["Q8_0"] * 4, "Q8_0"),
        ("q4_0", "Q4_0", ["Q4_0"] * 4, ["Q4_0"] * 4, "Q4_0"),
        ("bf16", "BF16", ["BF16"] * 4, ["BF16"] * 4, "BF16"),
        ("q2_k", "Q2_K", ["Q4_K"] * 4, ["IQ4_NL"] * 4, "Q6_K"),
        ("q4_k_m", "Q4_K", ["Q4_K", "Q4_K", "Q6_K", "Q6_K"], ["Q5_0", "Q5_0", "Q8_0", "Q8_0"], "Q6_K"),
        ("iq4_xs", "IQ4_XS", ["Q5_K"] * 4, ["IQ4_NL"] * 4, "Q6_K"),
    ],
)
def test_gguf_blocks_are_ggmls_to_the_bit(outtype, up, values, down, head, tmp_path):
    """The kinds of tensors are those of llama.cpp's rules: four query heads share a value, rows of 128 take smaller blocks."""
    folder = checkpoint(tmp_path / "model", hidden_size=256, head_dim=64, intermediate_size=128, num_key_value_heads=1)
    file = run(folder, tmp_path / "model.gguf", "gguf", outtype=outtype)
    before, found = tensors(folder), {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    kinds = {name: GGMLQuantizationType(tensor.tensor_type).name for name, tensor in found.items()}
    assert (kinds["blk.1.ffn_up.weight"], kinds["output.weight"], kinds["blk.0.attn_norm.weight"]) == (up, head, "F32")
    assert [kinds[f"blk.{layer}.attn_v.weight"] for layer in range(4)] == values
    assert [kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == down
    for hf, ggml in (("mlp.up_proj", "ffn_up"), ("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        tensor = found[f"blk.3.{ggml}.weight"]
        blocks = ggmls_blocks(before[f"model.layers.3.{hf}.weight"], tensor.tensor_type)
        np.testing.assert_array_equal(tensor.data.view(np.uint8), blocks, err_msg=tensor.name)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "Q5_1", "Q3_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_every_kind_is_ggmls_to_the_bit(kind):
    value = np.random.Generator(np.random.Philox(3)).standard_t(3, size=(16, 512)).astype(np.float32)
    value[5], value[6, :300] = 0, 1e-9
    blocks = ggmls_blocks(value, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(gguf_types.encode(value, kind), blocks)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_rows_encoded_on_several_cores_are_those_of_one(kind, monkeypatch):
    value = np.random.Generator(np.random.Philox(3)).normal(size=(7, 512)).astype(np.float32)
    whole = gguf_types.encode(value, kind)
    monkeypatch.setattr(gguf_types, "_VALUES_A_THREAD", 512)
    monkeypatch.setattr(gguf_types.os, "cpu_count", lambda: 3)
    pools = []
    pool = gguf_types.ThreadPoolExecutor
    monkeypatch.setattr(gguf_types, "ThreadPoolExecutor", lambda count: pools.append(count) or pool(count))
    np.testing.assert_array_equal(gguf_types.encode(value, kind), whole)
    assert pools == [3]


def test_an_adapter_in_a_models_place_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for read in (open_checkpoint, lambda path: described_model(str(path))):
        with pytest.raises(CheckpointError, match="is a PEFT adapter, not a model"):
            read(tmp_path)


def test_bnb_4bit_is_bitsandbytes_own(folder, tmp_path):
    """Codes and maxima are those that bitsandbytes makes; transformers loads the folder; a second pass changes no bit."""
    written = run(folder, tmp_path / "bnb", "bnb-4bit")
    name = "model.layers.1.mlp.up_proj.weight"
    codes, state = bnb.quantize_4bit(
        torch.from_numpy(np.array(tensors(folder)[name])), compress_statistics=True, quant_type="nf4"
    )
    stored = load_file(written / "model.safetensors")
    assert np.array_equal(stored[name], codes.numpy())
    assert np.array_equal(stored[f"{name}.absmax"], state.absmax.numpy())
    model = AutoModelForCausalLM.from_pretrained(written, device_map="cpu")
    plain = run(written, tmp_path / "plain", "hf", dtype="float32")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        want, got = model(ids).logits.float(), AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits
    assert (want - got).abs().max() < 2e-5 * want.abs().max()
    again = run(written, tmp_path / "again", "bnb-4bit")
    for key, value in load_file(again / "model.safetensors").items():
        assert np.array_equal(value, stored[key]), key


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_merging_moves_the_weights_as_peft_does(to, folder, tmp_path):
    spec = add_lora(open_checkpoint(folder).spec(), r=4, alpha=8.0, targets=["q_proj", "k_proj", "down_proj"])
    generator = np.random.Generator(np.random.Philox(3))
    values = {name: generator.normal(0, 0.1, shape).astype(np.float32) for name, shape in trainable_shapes(spec).items()}
    write_adapter(tmp_path / "adapter", spec, values, str(folder))
    name = {"hf": "merged", "gguf": "merged.gguf"}[to]
    found = run(folder, tmp_path / name, to, merge=tmp_path / "adapter", dtype="float32", outtype="f32")
    base = AutoModelForCausalLM.from_pretrained(folder)
    judge = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    own = tensors(folder)
    for key, value in tensors(found).items():
        assert np.abs(value - judge[key].numpy()).max() <= 1e-6
        assert np.array_equal(value, own[key]) == (key.split(".")[-2] not in ("q_proj", "k_proj", "down_proj"))


def test_shards_hold_what_they_may_and_all_is_there(folder, tmp_path):
    written = run(folder, tmp_path / "out", "hf", shard_bytes=100_000)
    files = sorted(written.glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 100_000 + 10_000 for file in files)
    index = json.loads((written / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {file.name for file in files}
    model = AutoModelForCausalLM.from_pretrained(written)
    for name, value in tensors(folder).items():
        assert np.array_equal(model.state_dict()[name].numpy(), value)
    assert (written / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_conversion_that_is_stopped_leaves_the_destination_as_it_was(folder, tmp_path):
    for to, destination in (("hf", tmp_path / "there"), ("gguf", tmp_path / "there.gguf")):
        if to == "hf":
            destination.mkdir()
            for name in ("mine", "config.json"):
                (destination / name).write_text("kept")
        else:
            destination.write_text("kept")
        with pytest.raises(ExistsError, match="--overwrite"):
            run(folder, destination, to)

        def stop(count):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(plan(str(folder), destination, to, Options(overwrite=True)), stop)
        assert (destination / "mine" if to == "hf" else destination).read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "there.gguf"]


@pytest.mark.parametrize("to", ["hf", "bnb-8bit", "gguf", "orbax"])
def test_a_disk_that_is_full_is_told_and_leaves_the_destination_as_it_was(to, folder, tmp_path):
    """A limit on the size of files stands for it; then what must not be replaced, whatever was asked for."""
    destination = tmp_path / ("there.gguf" if to == "gguf" else "there")
    destination.mkdir() if to != "gguf" else destination.write_text("kept")
    planned = plan(str(folder), destination, to, Options(overwrite=True))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"there(\.gguf)? could not be written: .*; what was there before is as it was"):
            convert(planned)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [destination.name] and destination.is_dir() == (to != "gguf")
    (tmp_path / "link").symlink_to(folder)
    wrong = {"link": "is a link; name the folder", "file": "is a file, and a folder is to be written"}
    (tmp_path / "file").write_text("kept")
    if to == "gguf":
        (tmp_path / "folder").mkdir()
        wrong = {"folder": "is a folder, and a file is to be written"}
    for name, message in wrong.items():
        with pytest.raises(ExistsError, match=message):
            run(folder, tmp_path / name, to, overwrite=True)


_KILLED = """
import os, signal, sys
from pathlib import Path
from jaxsloth.convert.run import Options, convert, plan
source, destination, to = sys.argv[1:]
count = iter(range(5))
killed = lambda _: next(count, None) is None and os.kill(os.getpid(), signal.SIGKILL)
convert(plan(source, Path(destination), to, Options(overwrite=True)), killed)
"""


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_conversion_that_is_killed_leaves_the_destination_as_it_was(to, folder, tmp_path):
    """kill -9 behind the fifth tensor: what was there is there, and the next try is whole and clears the leftovers away, but
    not another's that is being written."""
    destination = tmp_path / ("there.gguf" if to == "gguf" else "there")
    kept = run(folder, destination, to, dtype="float16")
    before = {name: value.copy() for name, value in tensors(kept).items()}
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(destination), to], check=False)
    assert done.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())  # it was in the middle
    assert all(np.array_equal(value, before[name]) for name, value in tensors(destination).items())
    (tmp_path / f".tmp-{destination.name}-7").mkdir()
    busy = os.open(tmp_path / f".tmp-{destination.name}-7", os.O_RDONLY)
    fcntl.flock(busy, fcntl.LOCK_EX)  # as the process does that writes it
    (tmp_path / ".tmp-there-too-8").mkdir()
    after = tensors(run(folder, destination, to, overwrite=True, outtype="f32"))
    os.close(busy)
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp-")}
    assert names == {f".tmp-{destination.name}-7", ".tmp-there-too-8"}
    assert after.keys() == before.keys() and all(np.array_equal(value, after[name]) for name, value in tensors(folder).items())


def test_what_cannot_be_written_is_refused_before_the_first_byte(folder, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    settings = json.loads((damaged / "tokenizer.json").read_text(encoding="utf-8"))
    settings["model"]["type"] = "Unigram"
    (damaged / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: model.type must be BPE"):
        run(damaged, tmp_path / "x.gguf", "gguf")
    with pytest.raises(ValueError, match="--to run-state takes the orbax tree of a run's checkpoint"):
        run(folder, tmp_path / "checkpoint-3", "run-state")
    with pytest.raises(ValueError, match="outtype must be one of"):
        run(folder, tmp_path / "x.gguf", "gguf", outtype="q9")
    monkeypatch.setattr(gguf_types, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"jaxsloth\[gguf\]"):
        run(folder, tmp_path / "x.gguf", "gguf", outtype="q4_k_m")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(WriteError, match=r"out needs 0\.7 MiB and 16\.0 MiB to spare, and the disk has 0\.0 MiB left"):
        run(folder, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("to", "options", "value", "message"),
    [
        ("bnb-8bit", {}, 1e6, r"up_proj\.weight holds 1 value too large for float16"),
        ("bnb-8bit", {}, np.nan, r"up_proj\.weight holds NaN or infinite values, which int8 can't"),
        ("bnb-4bit", {}, np.nan, r"up_proj\.weight holds NaN or infinite values, which NF4 can't"),
        ("bnb-4bit", {}, np.inf, r"up_proj\.weight holds NaN or infinite values, which NF4 can't"),
        ("gguf", {"outtype": "f16"}, 1e6, r"up_proj\.weight holds 1 value too large for float16 \(the first is 1e\+06\)"),
        (
            "gguf",
            {"outtype": "q8_0"},
            -1e6,
            r"up_proj\.weight holds 1 value too large for the float16 scales of Q8_0",
        ),
        ("gguf", {"outtype": "q4_0"}, np.nan, r"up_proj\.weight holds NaN or infinite values, which Q4_0 can't"),
        ("hf", {"dtype": "float16"}, 1e6, r"up_proj\.weight holds 1 value too large for float16"),
        ("maxtext", {"dtype": "float16"}, 1e6, r"up_proj\.weight holds 1 value too large for float16"),
    ],
)
def test_values_that_a_format_can_not_hold_are_refused(to, options, value, message, tmp_path, caplog):
    """Or where that is asked for, too large ones become float16's largest, and are counted; what is no number never does."""
    folder = checkpoint(tmp_path / "model", num_hidden_layers=2)
    weights = random_weights(json.loads((folder / "config.json").read_text()), 0)
    weights[UP][0, 0], target = value, tmp_path / ("out.gguf" if to == "gguf" else "out")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        run(folder, target, to, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    if not np.isfinite(value):
        with pytest.raises(CheckpointError, match=message):
            run(folder, target, to, allow_overflow=True, **options)
        return
    found = tensors(run(folder, target, to, allow_overflow=True, **options))
    assert f"1 of the values were too large and became the largest there is, by tensor: {UP} (1)" in caplog.text
    np.testing.assert_allclose(found[UP][0, 0], np.copysign(65504, value), rtol=1e-3)
    np.testing.assert_allclose(found[UP][1:], weights[UP][1:], atol=1e-2 * np.abs(weights[UP][1:]).max())


def test_what_is_read_and_what_is_no_model_is_never_replaced(folder, tmp_path):
    """Whatever was asked for: a source's folder, one that it lies in, an adapter's, a folder of other things, no name. An
    adapter that names another base than it is merged into is told."""
    own, adapter = tmp_path / "models" / "own", tmp_path / "adapter"
    shutil.copytree(folder, own)
    (tmp_path / "models" / "config.json").write_text("{}")
    spec = add_lora(described_model(str(own)), r=2, alpha=2.0)
    values = {name: np.zeros(shape, np.float32) for name, shape in trainable_shapes(spec).items()}
    write_adapter(adapter, spec, values, base_model=str(own))
    assert plan(str(own), tmp_path / "x", "hf", Options(merge=adapter)).notes == ()
    (note,) = plan(str(folder), tmp_path / "x", "hf", Options(merge=adapter)).notes
    assert f"names {own} as its base, and is merged into {folder}" in note
    file = run(own, tmp_path / "own.gguf", "gguf")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for source, destination, to, options, message in (
        (own, own, "hf", {}, r"own holds \S*own/config\.json, which is read"),
        (own, tmp_path / "models", "bnb-4bit", {}, r"models holds \S*own/config\.json, which is read"),
        (own, adapter, "hf", {"merge": adapter}, "adapter holds .*adapter, which is read"),
        (file, file, "gguf", {}, r"own\.gguf holds .*own\.gguf, which is read"),
        (adapter, adapter, "peft", {}, "adapter holds .*adapter, which is read"),
        (own, tmp_path / "home", "hf", {}, "home holds letter and no model or adapter"),
        (own, tmp_path / "home" / "..", "hf", {}, "must be a folder that is named itself"),
        (own, tmp_path / "no-ending", "gguf", {}, r"must end in \.gguf, by which it is known; got no-ending"),
    ):
        with pytest.raises(ValueError, match=message):
            run(source, destination, to, overwrite=True, **options)
    with pytest.raises(ExistsError, match=r"adapter holds .*adapter_config\.json, which is read"):
        convert_state(adapter, adapter, "orbax", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("kind", "dtype"), [("f32", "F32"), ("f16", "F16"), ("q8_0", "BF16")])
def test_a_gguf_file_keeps_its_dtype_as_a_folder(kind, dtype, folder, tmp_path):
    """What is in 16 or 32 bits stays to the bit, whatever config.json would say; blocks become bfloat16."""
    file = run(folder, tmp_path / "m.gguf", "gguf", outtype=kind)
    source = open_checkpoint(run(file, tmp_path / "back", "hf")).source
    assert source.stored_as(UP) == dtype
    want = tensors(folder)[UP].astype(np.float16 if kind == "f16" else np.float32)
    assert kind == "q8_0" or np.array_equal(source.read(UP), want)


def test_options_that_would_change_nothing_are_refused(folder, tmp_path, capsys):
    for to, options, message in (
        ("hf", ["--outtype", "q8_0"], "--outtype is of --to gguf and gguf-lora, and --to hf was asked for"),
        ("gguf", ["--dtype", "bfloat16"], "--dtype has no effect on --to gguf; leave it out (--outtype says"),
        ("bnb-4bit", ["--base", "x"], "--base is of adapters (--to peft, gguf-lora)"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["convert", str(folder), str(tmp_path / "m.gguf"), "--to", to, *options])
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_commands(folder, tmp_path, capsys):
    for arguments in (
        ["convert", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--dry-run"],
        ["convert", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--outtype", "Q8_0"],
        ["inspect", str(tmp_path / "m.gguf")],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "39 tensors (30 in F16, 9 in F32)" in said and "wrote" in said
    found = describe(str(tmp_path / "m.gguf"))
    assert found["tensors"]["model.layers.0.mlp.up_proj.weight"] == {"shape": [128, 64], "dtype": "Q8_0"}
    assert describe(str(folder))["values"] == sum(value.size for value in tensors(folder).values())


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), (7, 7)])
def test_sizes(text, size):
    assert parse_size(text) == size
    for wrong in ("", "5XB", 0, None, "-1GB"):
        with pytest.raises(ValueError, match="5GB"):
            parse_size(wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_llama_cpp_answers_as_transformers_does(tmp_path):
    """SmolLM2: in 16 bits the same greedy tokens on five prompts, in 8 and 4 the distributions within their bars."""
    import xllamacpp

    folder = run(SMOLLM2, tmp_path / "hf", "hf", dtype="float32")
    file = run(folder, tmp_path / "m.gguf", "gguf", outtype="f16")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(file), 256, False
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    for prompt in ("The capital of France is", "def add(a, b):", "Once upon a time", "1, 2, 3, 4,", "Water boils at"):
        found = server.handle_completions({"prompt": prompt, "n_predict": 12, "temperature": 0.0})
        ids = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert found["choices"][0]["text"] == tokenizer.decode(answer), prompt
    kept = [check(str(folder), str(file))]
    kept += [
        check(str(folder), str(run(folder, tmp_path / f"{bits}.gguf", "gguf", outtype=bits))) for bits in ("q8_0", "q4_k_m")
    ]
    assert [found.misses for found in kept] == [(), (), ()]
    assert 0 < kept[0].mean_kl < 1e-3 < kept[1].mean_kl < kept[2].mean_kl
