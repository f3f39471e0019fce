"""What README says works with an extra works where nothing else is installed; what is missing names the extra to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from jaxsloth.extras import PACKAGES
from tests.support.environments import ROOT, Environment, closure, extras_of_project
from tests.support.tiny import recipe_values, write_checkpoint, write_rows

# Runs commands one after the other: [[exit code or the error, stdout, stderr], …].
COMMANDS = """
import contextlib, io, json, sys
from jaxsloth.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException as error:
            code = repr(error)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
PUBLIC = """
import sys
import jaxsloth
for name in sys.argv[1:]:
    try:
        getattr(jaxsloth, name)
        print("ok")
    except jaxsloth.extras.MissingExtraError as error:
        print(error)
"""
FRONTEND = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from jaxsloth import DPOConfig, DPOTrainer, FastLanguageModel, SFTConfig, SFTTrainer

checkpoint, backend = sys.argv[1:3]
model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, backend=backend, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj"])
rows = [{"prompt": "the duck", "completion": f"lays {n} eggs"} for n in range(4)]
config = SFTConfig(output_dir="sft", max_steps=1, max_length=32, report_to="none")
SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer).train()
model.save_pretrained("adapter")
again, _ = FastLanguageModel.from_pretrained("adapter", backend=backend, load_in_4bit=True)
assert again.generate("the duck", max_new_tokens=3) == model.generate("the duck", max_new_tokens=3)
if backend == "torch":
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    config = DPOConfig(output_dir="dpo", max_steps=1, max_length=32, report_to="none")
    DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer).train()
    ids = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 8
    config = TrainingArguments(output_dir="trainer", max_steps=1, report_to="none", use_cpu=True)
    Trainer(model, config, train_dataset=ids).train()
print("all of it")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_checkpoint(folder / "model"), write_rows(folder / "rows.jsonl")


@pytest.fixture
def recipe(tiny, tmp_path) -> Path:
    values = recipe_values(tiny[0], tiny[1], tmp_path / "out", steps=1, backend="auto")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def run_all(environment: Environment, commands: Sequence[Sequence[Any]]) -> list[tuple[Any, str, str]]:
    done = environment.run("-c", COMMANDS, json.dumps([[str(part) for part in command] for command in commands]))
    assert done.returncode == 0, done.stderr
    return [tuple(found) for found in json.loads(done.stdout.splitlines()[-1])]


def refused(found: tuple[Any, str, str], extra: str) -> bool:
    code, _, stderr = found
    return code == 2 and stderr.strip().splitlines()[-1].endswith(f"pip install 'jaxsloth[{extra}]'")


def test_an_extra_brings_what_its_part_imports():
    """And no more is asked for than it brings."""
    names = {"rouge_score": "rouge-score", "orbax": "orbax-checkpoint"}
    extras = extras_of_project()
    for extra, packages in PACKAGES.items():
        assert {names.get(package, package) for package in packages} <= closure((extra,))
        own = {Requirement(text).name for text in extras[extra]} - {"jaxsloth"}
        assert own <= {names.get(package, package) for package in packages}
    assert not closure(()) & {"torch", "jax", "peft", "trl"}


def test_nothing_but_the_package(tiny, recipe, tmp_path):
    environment = Environment(tmp_path / "none", ())
    model, rows = tiny
    info, schema, *rest = run_all(
        environment,
        [
            ["info"],
            ["schema"],
            ["train", recipe],
            ["train", recipe, "--backend", "jax"],
            ["generate", "--model", model, "--backend", "torch", "the duck"],
            ["evaluate", "--model", model, "--data", rows, "--metrics", "rouge"],
            ["parity"],
        ],
    )
    assert info[0] == schema[0] == 0
    assert "pip install 'jaxsloth[torch]'" in info[1] and "pip install 'jaxsloth[jax]'" in info[1]
    assert rest[0][2].endswith("no backend is installed; run: pip install 'jaxsloth[torch]' or 'jaxsloth[jax]'\n")
    for found, extra in zip(rest[1:], ("jax", "torch", "evaluate", "parity"), strict=True):
        assert refused(found, extra), found
    names = ("FastLanguageModel", "SFTTrainer", "DPOTrainer", "standardize_sharegpt", "set_backend", "Recipe")
    done = environment.run("-c", PUBLIC, *names)
    missing = "needs torch, peft, accelerate, which are not installed; run: pip install 'jaxsloth[frontend]'"
    assert done.stdout.splitlines() == [f"jaxsloth.{name} {missing}" for name in names[:3]] + ["ok"] * 3, done.stderr
    assert environment.run("-m", "jaxsloth.demo").stderr.strip().endswith("run: pip install 'jaxsloth[demo]'")


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "other"), [("torch", "jax"), ("jax", "torch")])
def test_one_backend(tiny, recipe, tmp_path, backend, other):
    environment = Environment(tmp_path / "one", (backend,))
    model, rows = tiny
    adapter = tmp_path / "out" / "adapter"
    *done, rouge, elsewhere, parity = run_all(
        environment,
        [
            ["train", recipe, "quantization=nf4-nested"],
            ["generate", "--model", model, "--adapter", adapter, "--max-new-tokens", 3, "the duck"],
            [
                "evaluate",
                "--model",
                adapter,
                "--data",
                rows,
                "--limit",
                4,
                "--metrics",
                "loss,accuracy,f1",
                "--max-new-tokens",
                3,
            ],
            ["info"],
            ["evaluate", "--model", model, "--data", rows, "--metrics", "bleu"],
            ["train", recipe, "--backend", other, f"checkpoints.output={tmp_path / 'other'}"],
            ["parity"],
        ],
    )
    assert [found[0] for found in done] == [0] * 4, done
    assert "summary" in done[0][1] and (adapter / "adapter_model.safetensors").is_file()
    assert refused(rouge, "evaluate") and refused(elsewhere, other) and refused(parity, "parity")
    stderr = environment.run("-c", "from jaxsloth import FastLanguageModel").stderr
    assert stderr.strip().endswith("run: pip install 'jaxsloth[frontend]'")


@pytest.mark.slow
def test_evaluate_with_a_backend(tiny, tmp_path):
    environment = Environment(tmp_path / "evaluate", ("torch", "evaluate"))
    model, rows = tiny
    command = ["evaluate", "--model", model, "--data", rows, "--limit", 4, "--metrics", "rouge,bleu", "--max-new-tokens", 3]
    (found,) = run_all(environment, [command])
    assert found[0] == 0 and "rougeL" in found[1] and "bleu" in found[1], found


@pytest.mark.slow
@pytest.mark.parametrize(("extras", "backend"), [(("frontend",), "torch"), (("frontend", "jax"), "jax")])
def test_the_front_end(tiny, tmp_path, extras, backend):
    environment = Environment(tmp_path / "front", extras)
    done = environment.run("-c", FRONTEND, str(tiny[0]), backend)
    assert done.stdout.splitlines()[-1:] == ["all of it"], done.stderr
    if backend == "torch":
        load = f"from jaxsloth import FastLanguageModel; FastLanguageModel.from_pretrained({str(tiny[0])!r}, backend='jax')"
        assert environment.run("-c", load).stderr.strip().endswith("run: pip install 'jaxsloth[jax]'")
    assert closure(("demo",)) == closure(("frontend", "jax"))  # and make demo, which .ci/run runs, is the rest


@pytest.mark.slow
def test_the_oldest_versions_that_are_allowed(tiny, tmp_path):
    """Of Hugging Face's libraries, which move what they hold: a machine may have older ones than this one."""
    extras, oldest = extras_of_project(), tmp_path / "oldest"
    allowed = {one.name: one for one in map(Requirement, (*extras[""], *extras["frontend"]))}
    lowest = [f"{name}=={next(iter(allowed[name].specifier)).version}" for name in ("transformers", "peft", "accelerate")]
    # What transformers 5.17 needs beside them and newer ones do not.
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(oldest)]
    subprocess.run([*command, *lowest, "huggingface-hub<2", "httpx", "httpcore", "sniffio"], check=True)
    environment = Environment(tmp_path / "frontend", ("frontend",))
    paths = os.pathsep.join(map(str, (ROOT, oldest, tmp_path / "frontend")))
    done = environment.run("-c", FRONTEND, str(tiny[0]), "torch", PYTHONPATH=paths)
    assert done.returncode == 0 and done.stdout.endswith("all of it\n"), done.stderr
