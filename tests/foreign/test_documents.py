"""The door itself: what it refuses, and that its errors name the file, the key, what must hold and what was got."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from jaxsloth import foreign
from jaxsloth.convert.files import whole_folder
from jaxsloth.foreign import (
    ForeignError,
    Schema,
    Size,
    check_writable_folder,
    local_path,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    validated,
)
from jaxsloth.models.registry import spec_from_config
from jaxsloth.training.lock import lock
from jaxsloth.transforms import match_modules
from tests.support.tiny import CONFIG


class OwnError(ForeignError):
    pass


class Fields(Schema):
    size: Size
    rate: Annotated[float, Field(gt=0)] = 1.0
    names: list[str] | None = None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file must be JSON, and is empty"),
        ("[", "file: not JSON: Expecting value at column 2"),
        ('{"a": 1,\n}', "file: not JSON: .* at line 2"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "file: the key 'c' is there twice"),
        ("[" * 100_000, "file is nested too deeply"),
        ("[" * 101 + "]" * 101, "file is nested too deeply"),
        ("9" * 5000, "file is not JSON that can be read: Exceeds"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(OwnError, match=message):
        parse_json(text, "file", OwnError)


def test_json_up_to_the_limit():
    assert parse_json("[" * 99 + "]" * 99, "file") and parse_json('{"a": [1e3, null]}', "file") == {"a": [1000.0, None]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "file is not YAML: the key 'a' is there twice"),
        ("a: [", "file is not YAML"),
        ("a: \x00", "file is not YAML"),
        ("a: &a [*a]", "file is nested too deeply"),
        ("[" * 3000, "file is nested too deeply"),
        ("a: 2001-99-99", "file is not YAML that can be read: month"),
        ("a: !!python/object/apply:os.system [ls]", "file is not YAML: could not determine a constructor"),
        ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)), "too much"),
    ],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(OwnError, match=message):
        parse_yaml(text, "file", OwnError)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], r"^file must hold an object of keys and values, got a list \[1\]$"),
        (None, "^file must hold an object of keys and values, got null$"),
        ({}, "^file: size is missing$"),
        ({"size": None}, r"^file: size must be a positive integer below 2\^31, got null$"),
        ({"size": "4"}, r"^file: size must be a positive integer below 2\^31, got '4'$"),
        ({"size": True}, "size must be .*got true"),
        ({"size": 10**10}, "size must be .*got 10000000000"),
        ({"size": 10**5000}, "size must be .*got …"),
        ({"size": 4, "rate": 0}, "^file: rate must be greater than 0, got 0$"),
        ({"size": 4, "rate": float("nan")}, "^file: rate must be a finite number, got nan$"),
        ({"size": 4, "names": "a"}, "^file: names must be a valid list, got 'a'$"),
        ({"size": 0, "rate": -1.0}, "(?s)file: size must be .*\n  file: rate must be"),
    ],
)
def test_documents_that_are_refused(value, message):
    with pytest.raises(OwnError, match=message):
        validated(Fields, value, "file", OwnError)


def test_null_is_a_key_that_is_absent():
    assert validated(Fields, {"size": 4, "rate": None, "other": 5}, "file") == Fields(size=4)


def test_a_file_system_that_only_says_that_it_can_be_written():
    for place in ("/proc/out", "/proc/self/deep/out"):
        with pytest.raises(OwnError, match=r"output must be a folder that can be written, and /proc(/self)? can't be"):
            check_writable_folder(Path(place), "output", OwnError)
        with pytest.raises(ForeignError, match="the output folder must be a folder that can be written"), lock(Path(place)):
            pass
        with pytest.raises(ForeignError, match="the folder of out must be a folder"), whole_folder(Path(place)):
            pass


def test_files_that_are_none(tmp_path):
    (tmp_path / "text").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in {
        "text": "text must be UTF-8 text, got the byte 0xe9 at place 3",
        "gone": "there is no file .*gone",
        "pipe": "pipe must be a file, got a pipe",
        "loop": "loop can't be read: Too many levels",
        ".": "must be a file, got a folder",
        "n" * 300: "can't be read: File name too long",
    }.items():
        with pytest.raises(OwnError, match=message):
            read_text(tmp_path / name, OwnError)
    (tmp_path / "large").write_text('"' + "a" * 3_000_000 + '"')
    with pytest.raises(OwnError, match="large must be of at most 2 MiB, got 3 MiB"):
        read_json(tmp_path / "large", OwnError, 2 << 20)


def test_folders_that_can_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    check_writable_folder(tmp_path / "new" / "deep", "output")
    assert not (tmp_path / "new").exists()
    for folder, message in {
        tmp_path / "file": "output must be a folder that can be written, and .*file is a file",
        tmp_path / "file" / "under": "and .*file is a file",
        tmp_path / "dangling" / "under": "dangling is a link to nothing",
        tmp_path / ("n" * 300): "File name too long",
    }.items():
        with pytest.raises(OwnError, match=message):
            check_writable_folder(folder, "output", OwnError)


def test_paths():
    assert local_path("~/x", "output") == local_path("$HOME/x".replace("$HOME", os.path.expanduser("~")), "output")
    for text in ("", " ", "a\0b", "~nobody_of_this_name/x"):
        with pytest.raises(OwnError, match="output"):
            local_path(text, "output", OwnError)


NAMES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]


@pytest.mark.parametrize("expression", [r"(.+)+\!", r"(.|..)*\!", ".*" * 12 + "!", r"(?:[a-z.]*?(?:\w|\.)*){9}!"])
def test_an_expression_that_never_ends_is_refused(expression, monkeypatch):
    monkeypatch.setattr(foreign, "EXPRESSION_SECONDS", 0.5)
    began = time.perf_counter()
    with pytest.raises(ForeignError, match=r"lora.targets: the expression .* takes more than 0.5 s"):
        match_modules(spec_from_config(CONFIG), expression)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "expression",
    [r".*\.(q_proj|v_proj)", r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:model\.(x)?)", r"(\w+\.)+q_proj"],
)
def test_expressions_that_end_are_taken(expression):
    assert "model.layers.0.self_attn.q_proj" in match_modules(spec_from_config(CONFIG), expression)


def test_no_expression_and_one_that_the_trial_breaks_on():
    with pytest.raises(ForeignError, match=r"here: '\(' is no regular expression: .*; give names as a list"):
        foreign.check_expression("(", NAMES, "here")
    with pytest.raises(
        ForeignError, match=r"here: the expression .* can't be matched: re\.error: missing|PatternError: missing"
    ):
        foreign.check_expression("(a)+", NAMES, "here", around="({}")
