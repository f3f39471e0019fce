"""What the documents, docstrings and messages tell a reader to run or to open is there."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

import jaxsloth
from jaxsloth.cli import app
from jaxsloth.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
CODE = [
    file
    for folder in ("jaxsloth", "kernels", "torch_backend", "convert", "benchmarks", "examples", "tests")
    for file in (ROOT / folder).rglob("*.py")
    if file.resolve() == file and file != Path(__file__)
]
COMMAND = re.compile(r"(?:^|[`(]|python3? -m |2 -m )jaxsloth ((?:[a-z]+)(?: [^`\n#]*)?)", re.MULTILINE)


def commands_of(text: str) -> list[list[str]]:
    """``jaxsloth …`` where it stands as a command: in backticks, or at the beginning of a line of a block."""
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)) + "\n" + "\n".join(re.findall(r"`[^`\n]+`", text))
    return [shlex.split(found.replace("…", "").split(" > ")[0].strip()) for found in COMMAND.findall(blocks)]


def refusal(words: list[str]) -> str | None:
    """Why the command line would not take a command; a name alone is one."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name, *arguments = words
    if name not in commands:
        return f"there is no command {name}"
    if arguments:
        try:
            commands[name].make_context(name, arguments)
        except Exception as error:  # click's, which some versions of typer bring themselves
            return str(getattr(error, "message", error))
    return None


def test_a_command_that_is_not_there_is_found():
    assert commands_of("```\njaxsloth train a.yaml --backend jax  # so\n```\nor `jaxsloth frobnicate`") == [
        ["train", "a.yaml", "--backend", "jax"],
        ["frobnicate"],
    ]
    assert refusal(["frobnicate"]) == "there is no command frobnicate"
    assert "--bckend" in (refusal(["train", "a.yaml", "--bckend", "jax"]) or "")
    assert refusal(["train", "a.yaml", "--backend", "jax"]) is None


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_what_a_document_shows_is_there(file):
    text = file.read_text(encoding="utf-8")
    for words in commands_of(text):
        assert refusal(words) is None, f"jaxsloth {' '.join(words)}: {refusal(words)}"
    for module in re.findall(r"python3? -m\s+((?:benchmarks|jaxsloth)[\w.]*)", text):
        assert find_spec(module) is not None, module
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)
    assert set(shown) <= targets
    assert "../" not in text, "it points outside the repository"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (file.parent / link).exists(), link


def test_commands_that_docstrings_and_messages_name():
    for file in CODE:
        text = file.read_text(encoding="utf-8")
        names = re.findall(r"`jaxsloth ([a-z]+)", text) + re.findall(r"(?:with|run:?) jaxsloth ([a-z]+)", text)
        for name in names:
            assert refusal([name]) is None, f"{file.relative_to(ROOT)}: jaxsloth {name}"
        for module in re.findall(r"python3? -m (benchmarks[\w.]*\w)", text):
            assert find_spec(module) is not None, f"{file.relative_to(ROOT)}: {module}"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_recipes_and_code_of_the_readme(tmp_path):
    """Its recipes validate, and what its Python imports is there."""
    recipes, code = blocks("yaml"), blocks("python")
    assert recipes and code
    for text in recipes:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        assert load_recipe(tmp_path / "recipe.yaml", []).steps
    for text in code:
        compile(text, "README.md", "exec")
        for names in re.findall(r"^from jaxsloth import (.+)$", text, re.MULTILINE):
            assert set(names.split(", ")) <= set(jaxsloth.__all__)


def test_backticked_names_of_the_documents_are_in_the_code():
    """Functions, classes and settings that README and docs name; not those of other libraries."""
    others = {"DistributedDataParallel"}
    code = "\n".join(file.read_text(encoding="utf-8") for file in CODE)
    for file in DOCUMENTS:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for name in re.findall(r"`([A-Z]\w+|[a-z]+_[a-z_]+)(?:\(\))?`", text):
            assert name in others or re.search(rf"\b{name}\b", code), f"{file.name}: {name}"
