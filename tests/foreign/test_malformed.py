"""Hundreds of malformed files through the doors that read them: no raw traceback, no silent success, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

import jaxsloth.data.limited as limits
from jaxsloth.cli import main
from jaxsloth.convert.checkpoint import find_checkpoint
from jaxsloth.convert.peft_adapter import base_model_of, fitted_adapter, write_adapter
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.data.encode import encode_rows
from jaxsloth.data.errors import DataError
from jaxsloth.data.sources import load_rows
from jaxsloth.data.templates import ChatTemplate
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.recipe import load_recipe
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.training.run import check_output, train
from jaxsloth.transforms import add_lora
from tests.foreign.mutations import REMOVED, Case, judge, keys, same_arrays, values_for, whole
from tests.support.tiny import byte_tokenizer, recipe_values, tiny_recipe, write_checkpoint, write_rows

pytestmark = pytest.mark.slow
COUNTED: dict[str, int] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its rows, an adapter and a run of one step, each of which is broken in turn and mended."""
    folder = tmp_path_factory.mktemp("place")
    write_checkpoint(folder / "model", num_hidden_layers=1, num_attention_heads=4)
    write_rows(folder / "rows.jsonl", 6)
    spec = add_lora(find_checkpoint(str(folder / "model")).spec(), r=2, alpha=4.0, targets=["q_proj"])
    values = initial_adapters(spec, "kaiming", 0, lambda name: np.zeros(0))
    write_adapter(folder / "adapter", spec, values, str(folder / "model"))
    train(run_recipe(folder), stop_after=1, quiet=True)
    return folder


def run_recipe(folder):
    return tiny_recipe(folder / "model", folder / "rows.jsonl", folder / "run", steps=2)


def listing(folder):
    return sorted((str(f.relative_to(folder)), f.lstat().st_size) for f in folder.rglob("*"))


def check(kind, place, file: Path, cases, door, allowed):
    """Puts every case in the file's place, and the file back in the end."""
    original = file.read_bytes()
    before = {name: size for name, size in listing(place) if name != str(file.relative_to(place))}

    def placed():
        for case in cases:
            file.write_bytes(case.content)
            yield case, door, file.name

    try:
        outcome = judge(kind, placed(), allowed)
    finally:
        file.write_bytes(original)
    after = {name: size for name, size in listing(place) if name != str(file.relative_to(place))}
    assert after == before
    print(f"{kind}: {outcome.total} cases, {outcome.refused} refused, {outcome.accepted} rightly taken")
    assert not outcome.wrong, f"{len(outcome.wrong)} of {outcome.total}:\n" + "\n".join(outcome.wrong)
    COUNTED[kind] = outcome.total
    return outcome


def both_ways(file, **options):
    document = json.loads(file.read_text())
    return [*whole(file.read_bytes()), *keys(document, **options)]


def test_configs(place):
    file = place / "model" / "config.json"
    right = find_checkpoint(str(place / "model")).spec()

    def door():
        load_tokenizer(place / "model")
        return find_checkpoint(str(place / "model")).spec()

    def allowed(case: Case, spec):
        """Ids may be other ids or none; anything else must leave the model as it is."""
        if case.key and case.key[0] in ("bos_token_id", "eos_token_id") and case.value in (REMOVED, None, 0, []):
            return True
        if case.key == ("rope_theta",) and case.name.endswith("huge"):
            return spec != right  # 1e30 is a base that float32 holds: what was asked for
        return spec == right

    check("config", place, file, both_ways(file), door, allowed)


def test_ropes(place):
    file = place / "model" / "config.json"
    original = json.loads(file.read_text())
    for rope in (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    ):
        config = original | {"rope_parameters": rope}
        cases = [case for case in keys(config, inside=("rope_parameters",)) if case.key[:1] == ("rope_parameters",)]

        def allowed(case: Case, spec, rope=rope):
            """A key that its kind can do without may be absent: what is left must be what was asked for."""
            absent = case.value is REMOVED or case.value is None or (len(case.key) == 1 and case.value in ({}, []))
            return absent or (case.key[-1] in ("high_freq_factor", "beta_fast", "attention_factor") and case.value == 10**30)

        door = lambda: find_checkpoint(str(place / "model")).spec()  # noqa: E731
        check(f"rope {rope['rope_type']}", place, file, cases, door, allowed)


def test_generation_configs(place):
    file = place / "model" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}))

    def allowed(case: Case, opened):
        """What is absent is the default's; a number is looked at by the settings that it goes into."""
        key = case.key[0]
        return opened.generation.get(key) is None or (key != "do_sample" and case.value in (0, -0.7, -5, -0.9, 10**30, []))

    check("generation_config", place, file, both_ways(file), lambda: find_checkpoint(str(place / "model")), allowed)
    file.unlink()


def test_indexes(place):
    folder = place / "sharded"
    shutil.copytree(place / "model", folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", place / "outside.safetensors")
    file = folder / "model.safetensors.index.json"

    def tensors():
        source = find_checkpoint(str(folder)).source
        return {name: np.asarray(source.read(name)) for name in source.names()}

    index = {
        "metadata": {"total_size": 5},
        "weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "a.safetensors"},
    }
    file.write_text(json.dumps(index))
    right = tensors()
    cases = both_ways(file, inside=("weight_map",))
    absolute = str(place / "outside.safetensors")
    for name in (
        "../outside.safetensors",
        absolute,
        "./a.safetensors",
        "b/../a.safetensors",
        "a.safetensors\0",
        "..",
        ".",
        "a.bin",
    ):
        changed = {"weight_map": {"lm_head.weight": name}}
        cases.append(Case(f"shard {name}", json.dumps(changed).encode(), ("weight_map", "escape"), name))

    def taken(case: Case, found):
        """The other entry names the same file; metadata is not read."""
        return same_arrays(found, right) and (case.key[:1] != ("weight_map",) or case.value is REMOVED)

    try:
        check("index", place, file, cases, tensors, taken)
    finally:
        shutil.rmtree(folder)


def test_safetensors_headers(place):
    file = place / "model" / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def packed(value) -> bytes:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + data

    name = "model.norm.weight"
    cases = [Case(case.name, packed(case.content), case.key, case.value) for case in whole(json.dumps(header).encode())]
    for case in keys(header[name]):
        if case.key:
            changed = header | {name: json.loads(case.content)}
            cases.append(Case(case.name, packed(changed), case.key, case.value))
    cases += [Case("a length of 2^60", (1 << 60).to_bytes(8, "little") + content[8:]), Case("cut", content[:-100])]
    right = {n: np.array(v) for n, v in tensors_of(place).items()}
    check("safetensors", place, file, cases, lambda: tensors_of(place), lambda case, found: same_arrays(found, right))


def tensors_of(place):
    opened = find_checkpoint(str(place / "model"))
    opened.spec()
    return {name: np.asarray(opened.source.read(name)) for name in opened.source.names()}


def test_tokenizers(place):
    folder = place / "model"
    right = load_tokenizer(folder)("the duck lays")["input_ids"]

    def door():
        tokenizer = load_tokenizer(folder)
        try:
            ChatTemplate(tokenizer).render([{"role": "user", "content": "hi"}])
        except DataError as error:  # the template lacks a token that tokenizer_config.json should name: its folder is named
            raise DataError(f"{error} (tokenizer_config.json)" if str(folder) in str(error) else str(error)) from error
        return tokenizer("the duck lays")["input_ids"]

    file = folder / "tokenizer_config.json"
    check("tokenizer_config", place, file, both_ways(file), door, lambda case, ids: ids == right)
    file = folder / "tokenizer.json"
    cases = [*whole(file.read_bytes()), *(case for case in keys(json.loads(file.read_text())) if case.key)]

    def door_of_whole():
        try:
            return door()
        except DataError as error:  # the tokenizers package does not say which file: the folder is named
            raise DataError(f"{error} (tokenizer.json)" if str(folder) in str(error) else str(error)) from error

    defaulted = ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")

    def allowed(case: Case, ids):
        return ids == right or (case.key[0] in defaulted and case.value in (REMOVED, None, []))

    check("tokenizer", place, file, cases, door_of_whole, allowed)


def test_adapters(place):
    file = place / "adapter" / "adapter_config.json"
    base = find_checkpoint(str(place / "model")).spec()
    right_spec, right = fitted_adapter(place / "adapter", base)

    def door():
        try:
            return base_model_of(place / "adapter"), *fitted_adapter(place / "adapter", base)
        except CheckpointError as error:  # whether it fits the model is told of its folder
            raise CheckpointError(
                f"{error} (adapter_config.json)" if str(place / "adapter") in str(error) else str(error)
            ) from error

    def allowed(case: Case, found):
        """The same adapter; or another dropout, another base's name: those are what the user says."""
        name, spec, values = found
        if case.key and case.key[0] in ("lora_dropout", "base_model_name_or_path"):
            return same_arrays(values, right) and isinstance(name, str) and bool(name)
        return spec == right_spec and same_arrays(values, right)

    check("adapter", place, file, both_ways(file), door, allowed)


def test_recipes(place):
    file = place / "recipe.yaml"
    values = recipe_values(str(place / "model"), place / "rows.jsonl", place / "new")
    values |= {"quantization": "none", "evaluation": {"batch_size": 4}, "log_every": 1}
    values["data"] |= {"packing": False, "limit": 4}
    file.write_text(yaml.safe_dump(values))
    spec = find_checkpoint(str(place / "model")).spec()
    sections = ("data", "lora", "optimizer", "schedule", "evaluation", "checkpoints")

    def door():
        recipe = load_recipe(file)
        try:
            check_output(recipe, False)
            recipe.apply(spec)
        except ValueError as error:
            raise type(error)(f"{file}: {error}") from error
        return recipe

    def allowed(case: Case, recipe):
        """A field is what was written, exactly; absent or null it has its default, which null may be."""
        if not case.key:
            return False
        held = recipe.model_dump(mode="json")
        for part in case.key:
            held = held[part]
        if case.value is REMOVED or case.value in ({}, []):
            return True
        return held == case.value and isinstance(held, bool) == isinstance(case.value, bool)

    dumped = [*whole(b"model: x\nsteps: 3\n"), *keys(values, yaml.safe_dump, inside=sections)]
    dumped = [case for case in dumped if case.name != "a key twice"]
    dumped += [Case("a key twice", file.read_bytes() + b"\nseed: 3\n"), Case("itself", b"&a {model: *a}")]
    check("recipe", place, file, dumped, door, allowed)
    file.unlink()


def test_trainer_states(place):
    file = place / "run" / "checkpoint-1" / "trainer_state.json"
    counts = ("tokens", "seconds", "devices", "backend", "best_step", "best_loss", "first_tokens", "first_seconds")

    def allowed(case: Case, saved):
        """What is counted beside the numbers may be other; the step and the recipe must be the run's."""
        return saved.state.step == 1 and case.key[0] in counts

    check("trainer_state", place, file, both_ways(file), lambda: check_output(run_recipe(place), True), allowed)
    file = place / "run" / "checkpoint-1" / "adapter_config.json"
    check("saved adapter", place, file, list(whole(file.read_bytes())), lambda: check_output(run_recipe(place), True), never)
    file = place / "run" / "recipe.yaml"
    check("saved recipe", place, file, list(whole(file.read_bytes())), lambda: check_output(run_recipe(place), True), never)


def never(case, found):
    return False


def test_data(place):
    tokenizer = load_tokenizer(place / "model")
    settings = run_recipe(place).data
    row = {"prompt": "why? ", "completion": "because"}
    rows = place / "rows"
    rows.mkdir()
    for kind in ("jsonl", "json", "csv", "parquet"):
        file = rows / f"data.{kind}"
        write_table(file, row)

        def door(file=file):
            try:
                return encode_rows(load_rows(str(file)), tokenizer, settings)
            except DataError as error:
                raise DataError(f"{file}: {error}") from error

        cases = list(whole(file.read_bytes() if kind != "parquet" else b'{"a": 1}'))
        if kind == "parquet":
            content = file.read_bytes()
            cases += [Case(f"cut at {n}", content[:n]) for n in range(0, len(content), max(len(content) // 20, 1))]
            for n in range(len(content) - 60, len(content)):
                flipped = bytes([content[n] ^ 0xFF])
                cases.append(Case(f"byte {n}", content[:n] + flipped + content[n + 1 :]))
        if kind in ("jsonl", "json"):
            cases += list(keys(row))
            cases += [
                Case("a row of text", b'{"text": 5}'),
                Case("no fields", b"{}"),
                Case("two rows", b'{"text": "a"}\n{"prompt": 5}'),
            ]

        def allowed(case: Case, examples, kind=kind):
            """Digits are text like any other; a flipped byte may lie where nothing is read."""
            if kind == "parquet":
                return case.name.startswith("byte") and len(examples) == 1
            return (kind == "csv" and len(examples) == 1) or case.value in ("12", "")

        check(f"data {kind}", place, file, cases, door, allowed)


def write_table(file, row):
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({key: [value] for key, value in row.items()}), file)
    elif file.suffix == ".csv":
        file.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        file.write_text(json.dumps(row if file.suffix == ".jsonl" else [row]))


GGUF = {
    "general.architecture": "llama",
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.block_count": 1,
    "llama.context_length": 256,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.eos_token_id": 1,
}


def write_gguf(file, fields):
    """A model of one layer; a value of Python's type has ggml's nearest."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, fields.get("general.architecture", "llama"))
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
            kinds.get(type(value), writer.add_int32 if type(value) is int and value < 0 else writer.add_uint32)(key, value)
    shapes = {"token_embd": (260, 64), "output_norm": (64,), "output": (260, 64)}
    shapes |= {f"blk.0.{name}": (64,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64)}
    shapes |= {"blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(place):
    file = place / "model.gguf"
    write_gguf(file, GGUF)
    right, content = find_checkpoint(str(file)).spec(), file.read_bytes()
    cases = list(whole(b'{"a": 1}'))
    cases += [Case(f"cut at {n}", content[:n]) for n in range(0, 900, 30)]
    other = place / "other.gguf"
    for key, value in GGUF.items():
        for name, wrong in values_for(value).items():
            if wrong is None or isinstance(wrong, dict) or wrong == [] or wrong == 10**30:
                continue  # what the format can't hold
            fields = {k: v for k, v in GGUF.items() if k != key} | ({} if wrong is REMOVED else {key: wrong})
            if key == "general.architecture" and not isinstance(wrong, str):
                continue
            write_gguf(other, fields)
            cases.append(Case(f"{key} {name}", other.read_bytes(), (key,), wrong))
    other.unlink()

    def allowed(case: Case, spec):
        """An end of answers may be another token, or none (as which the writer takes an empty string)."""
        if case.key == ("tokenizer.ggml.eos_token_id",) and case.value in (REMOVED, 0, ""):
            return True
        return spec == right

    check("gguf", place, file, cases, lambda: find_checkpoint(str(file)).spec(), allowed)
    file.unlink()


TEMPLATES = [
    "{{ 1 / 0 }}",
    "{{ 1 % 0 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'a' * 100000000000 }}",
    "{{ [1] * 99999999 * 99999999 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in messages recursive %}{{ loop([x]) }}{% endfor %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}{{ y.z() }}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}abcdefgh{% endfor %}{% endfor %}",
    "{% for i in range(99999999) %}{% endfor %}",
    "{% set n = namespace(a='aaaaaaaaaaaaaaaa') %}{% for i in range(70) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}",
    "{% if %}",
    "{% for m in messages %}",
    "{{ messages[9].content }}",
    "{{ messages.content.nope }}",
    "{{ nope.nope }}",
    "{{ messages | nofilter }}",
    "{{ nofunction() }}",
    "{{ messages[0].content + 3 }}",
    "{{ messages | groupby }}",
    "{{ 'x'.join(5) }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception() }}",
    "{{ namespace(a=1).__class__ }}{{ raise_exception('') }}",
    "{{" + "(" * 4000 + ")" * 4000 + "}}",
    "{%" * 3000,
    "{{ strftime_now(5) }}",
    "{{ dict(5) }}",
    "{ no variable and no message }",
]


def test_templates(monkeypatch, place):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    tokenizer = byte_tokenizer()

    def door(text):
        return lambda: ChatTemplate(tokenizer, text).check_roles([{"role": "user", "content": "hi"}])

    cases = ((Case(text[:60], b""), door(text), "template") for text in TEMPLATES)
    outcome = judge("templates", cases, never)
    assert not outcome.wrong, "\n".join(outcome.wrong)
    COUNTED["templates"] = outcome.total


def test_places(place, tmp_path):
    """Folders, pipes and links that lead in a circle, where files are expected."""
    valid = place / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for kind in ("folder", "pipe", "loop"):
            folder = tmp_path / f"{name}-{kind}"
            shutil.copytree(valid, folder)
            file = folder / name
            file.unlink(missing_ok=True)
            {"folder": file.mkdir, "pipe": lambda f=file: os.mkfifo(f), "loop": lambda f=file: f.symlink_to(f)}[kind]()

            def allowed(case: Case, found, name=name, kind=kind):
                """A link in a circle is no file; what need not be there is not missed."""
                return kind == "loop" and name in ("generation_config.json", "tokenizer_config.json")

            def door(folder=folder):
                find_checkpoint(str(folder)).spec()
                load_tokenizer(folder)

            outcome = judge("places", iter([(Case(f"{name} {kind}", b""), door, str(folder))]), allowed)
            assert not outcome.wrong, outcome.wrong


COMMANDS = {
    "recipe": ["train", "{bad}"],
    "model": ["generate", "--model", "{folder}", "hi"],
    "adapter": ["generate", "--model", "{model}", "--adapter", "{folder}", "hi"],
    "evaluation": ["evaluate", "--model", "{model}", "--data", "{bad}.jsonl"],
}


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_line_says_it_in_words(place, tmp_path, capsys, kind, backend):
    for case in whole(b'{"a": 1}'):
        folder = tmp_path / case.name
        folder.mkdir()
        for name in ("config.json", "adapter_config.json", "bad", "bad.jsonl"):
            (folder / name).write_bytes(case.content)
        if kind == "model":
            (folder / "adapter_config.json").unlink()
        filled = {"bad": folder / "bad", "folder": folder, "model": place / "model"}
        with pytest.raises(SystemExit) as stopped:
            main([*(part.format(**filled) for part in COMMANDS[kind]), "--backend", backend])
        said = capsys.readouterr().err
        assert stopped.value.code == 2, (case.name, said)
        line = next(line for line in said.splitlines() if line.startswith("error: "))
        assert str(folder) in line and "Traceback" not in said, (case.name, said)


def test_they_are_hundreds():
    """Runs last: how many cases of each kind there were."""
    print(COUNTED)
    assert sum(COUNTED.values()) >= 500
