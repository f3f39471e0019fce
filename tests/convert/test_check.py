"""``--check`` and ``jaxsloth check``: what is right holds, and each thing that users report broken is caught."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jaxsloth import cli, extras
from jaxsloth.convert import gguf_adapter, gguf_tokenizer, gguf_writer
from jaxsloth.convert import run as conversion
from jaxsloth.convert.check import BARS, check, prompts_of, stored_as
from jaxsloth.convert.check_adapters import check_adapter
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.names import trainable_shapes
from jaxsloth.transforms import add_lora
from tests.support.tiny import with_merge, write_checkpoint

PROMPTS = ("the duck lays", "12 + 30  =")


def run(source, destination, to, **options):
    return convert(plan(str(source), destination, to, Options(**options)))


def checked(source, destination, **settings):
    return check(str(source), str(destination), prompts=PROMPTS, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a merge in its tokenizer and a token added after the vocabulary, as chat models have, fewer tokens than rows of
    the embedding, and a tied head."""
    changes = {"vocab_size": 272, "tie_word_embeddings": True}
    folder = with_merge(write_checkpoint(tmp_path_factory.mktemp("base") / "model", **changes))
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 259, "content": "<|turn|>"})
    file.write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(folder):
    spec = add_lora(open_checkpoint(folder).spec(), r=4, alpha=8.0, targets=["q_proj", "down_proj"])
    generator = np.random.Generator(np.random.Philox(3))
    values = {name: generator.normal(0, 0.05, shape).astype(np.float32) for name, shape in trainable_shapes(spec).items()}
    write_adapter(folder.parent / "adapter", spec, values, str(folder))
    return folder.parent / "adapter"


@pytest.mark.parametrize(
    ("to", "options", "kind"),
    [
        ("gguf", {"outtype": "f16"}, "F16"),
        ("gguf", {"outtype": "q8_0"}, "Q8_0"),
        ("hf", {}, "F32"),
        ("bnb-4bit", {}, "NF4"),
        ("orbax", {}, "F32"),
        ("maxtext", {"dtype": "bfloat16"}, "BF16"),
        ("tunix", {}, "F32"),
    ],
    ids=["f16", "q8_0", "hf", "bnb-4bit", "orbax", "maxtext", "tunix"],
)
def test_what_is_right_holds(to, options, kind, folder, tmp_path):
    written = run(folder, tmp_path / ("m.gguf" if to == "gguf" else "m"), to, **options)
    found = checked(folder, written)
    assert found.stored_as == kind == stored_as(open_checkpoint(written)) and not found.differing
    # The likeliest of a random model's tokens are hardly likelier than others: 4 bits change half of them.
    assert found.misses == () if kind != "NF4" else found.mean_kl < found.bar.mean_kl
    assert found.tokens == sum(len(text.encode()) - text.count("he") for text in PROMPTS)
    assert found.texts == 6 + 3  # of them three with an added token
    assert found.mean_kl == 0 if kind == "F32" else found.mean_kl > 0


def test_a_merge_moves_as_the_adapter_does_and_one_that_did_nothing_is_caught(folder, adapter, tmp_path, monkeypatch):
    written = run(folder, tmp_path / "m.gguf", "gguf", merge=adapter)
    found = checked(folder, written, merge=adapter)
    assert found.misses == () and found.moved.by_adapter > 1e-3
    assert found.moved.by_merge == pytest.approx(found.moved.by_adapter, rel=0.02) and abs(found.moved.share - 1) < 0.02
    monkeypatch.setattr(conversion, "merged", lambda name, value, spec, adapter: value)
    broken = run(folder, tmp_path / "n", "bnb-4bit", merge=adapter)
    found = checked(folder, broken, merge=adapter)
    assert any("as the adapter does" in miss for miss in found.misses) and abs(found.moved.share) < 0.4


@pytest.mark.parametrize("to", ["gguf-lora", "peft"])
def test_adapters_are_applied_by_their_own_readers(to, folder, adapter, tmp_path, monkeypatch, capsys):
    """PEFT over transformers' base, llama.cpp over the base's GGUF file; from GGUF to PEFT too. One that halves is caught."""
    source, written = adapter, run(adapter, tmp_path / "a.gguf", "gguf-lora", outtype="f32")
    if to == "peft":
        source, written = written, run(written, tmp_path / "a", "peft", base=str(folder))
    found = check_adapter(str(source), str(written), base=str(folder), prompts=PROMPTS)
    assert found.misses == () and abs(found.moved.share - 1) < 0.01 and found.moved.by_adapter > 1e-3
    if to == "peft":
        merged = run(folder, tmp_path / "merged", "hf", merge=source)
        assert checked(folder, merged, merge=source).misses == ()
        return
    monkeypatch.setattr(gguf_adapter, "encode", lambda value, kind, name, _: value / 2 if "lora_b" in name else value)
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(adapter), str(tmp_path / "b.gguf"), "--to", "gguf-lora", "--outtype", "f32", "--check"])
    assert ended.value.code == 1 and "verdict: missed" in capsys.readouterr().out


def test_rows_in_the_wrong_order_and_wrong_tokens_are_caught(folder, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    (other / "tokenizer.json").write_text(json.dumps(document | {"normalizer": {"type": "Lowercase"}}), encoding="utf-8")
    found = checked(folder, other)
    assert [text for text, _, _ in found.differing] == ["Don't WE'LL they've  مرحبا Привет"]
    assert "token ids differ in 1 of 9 texts" in found.misses[0] and found.mean_kl == 0
    monkeypatch.setattr(gguf_writer, "permute", lambda weight, heads: weight)
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--check"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 1 and (tmp_path / "m.gguf").is_file()
    assert "missed: the mean KL must be at most" in said and "stays as it was written" in said and "verdict: missed" in said


def test_a_gguf_whose_added_token_is_plain_text_is_caught(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "CONTROL", gguf_tokenizer.NORMAL)
    found = checked(folder, run(folder, tmp_path / "m.gguf", "gguf"))
    assert "a <|turn|> b<|turn|>" in [text for text, _, _ in found.differing]


def test_missing_packages_prompts_and_tokenizers_are_told_before_the_first_byte(folder, tmp_path, monkeypatch, capsys):
    def refused(*more):
        with pytest.raises(SystemExit) as ended:
            cli.main(["convert", str(folder), str(tmp_path / "m.gguf"), "--to", "gguf", "--check", *more])
        assert ended.value.code == 2 and not (tmp_path / "m.gguf").exists()
        return capsys.readouterr().err

    (tmp_path / "empty").write_text("\n \n", encoding="utf-8")
    assert "must hold a prompt a line" in refused("--check-prompts", str(tmp_path / "empty"))
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "xllamacpp" else object())
    assert "needs xllamacpp, which is not installed; run: pip install 'jaxsloth[check]'" in refused()
    monkeypatch.undo()
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        checked(bare, folder)


def test_the_command_on_a_file_that_is_there_already(folder, tmp_path, capsys):
    file = run(folder, tmp_path / "m.gguf", "gguf", outtype="q8_0")
    (tmp_path / "prompts").write_text("the duck\n\nsixteen eggs\n", encoding="utf-8")
    assert prompts_of(tmp_path / "prompts") == ("the duck", "sixteen eggs")
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(folder), str(file), "--prompts", str(tmp_path / "prompts")])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "verdict: held" in said and str(BARS["Q8_0"].mean_kl) in said


def test_a_damaged_file_is_an_error_and_not_a_crash(folder, tmp_path):
    file = run(folder, tmp_path / "m.gguf", "gguf")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"))
    file.write_bytes(file.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))
    with pytest.raises(CheckpointError, match=r"m\.gguf: llama\.cpp can't run it"):
        checked(folder, file)
