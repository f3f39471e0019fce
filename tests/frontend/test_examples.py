"""The example scripts, as a user runs them, on real weights at reduced size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.parity.subjects import SMOLLM2
from tests.support.modules import BACKENDS
from tests.support.tiny import write_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = {
    "STEPS": "2",
    "ROWS": "10",
    "NEW_TOKENS": "3",
    "SCORED": "1",
    "EVAL_STEPS": "1",
    "MAX_LENGTH": "144",
    "ACCUMULATION": "1",
}


def run(example: str, backend: str, output: Path) -> str:
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py")]
    environment = os.environ | SMALL | {"JAXSLOTH_BACKEND": backend, "OUTPUT": str(output), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, check=False, cwd=output)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_chat_sft(backend, tmp_path):
    said = run("chat_sft", backend, tmp_path)
    assert "it answers the same: True" in said
    assert re.search(r"learnt of the first row: Janet sells 16 - 3 - 4", said)
    assert re.search(r"peak \d+\.\d+ GB", said)
    assert (tmp_path / "lora_model" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpaca_sft(backend, tmp_path):
    said = run("alpaca_sft", backend, tmp_path)
    assert "7 rows to train on, 2 to choose by, 1 to test on" in said
    best = re.search(r"the best model is that of step ([12])\b", said)
    assert best and (tmp_path / f"checkpoint-{best[1]}").is_dir()
    scored = re.findall(r"^(\w+) +before +([\d.]+) +after +([\d.]+)$", said, re.MULTILINE)
    assert [name for name, *_ in scored] == ["test_loss", "rouge1", "rouge2", "rougeL", "bleu"]
    assert 0 < float(scored[0][2]) < float(scored[0][1])
    assert (tmp_path / "best" / "adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_peft_trainer(backend, tmp_path):
    said = run("peft_trainer", backend, tmp_path)
    held_out = re.search(r"held-out loss before ([\d.]+) +after ([\d.]+)", said)
    assert held_out and 0 < float(held_out[2]) < float(held_out[1]) < 5
    assert "it answers the same: True" in said
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_dpo(backend, tmp_path):
    said = run("dpo", backend, tmp_path)
    # The first loss is log 2 where policy and reference are the same: the SFT adapter, loaded.
    assert re.search(r"loss 0\.6931 -> 0\.\d+; margins -?0\.0000 -> ", said)
    assert re.search(r"peak \d+\.\d+ GB", said)
    assert (tmp_path / "dpo_model" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_orbax_to_nnx(tied, tmp_path):
    """Without jaxsloth: transformers' logits of a tiny model."""
    folder = write_checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    written = convert(plan(str(folder), tmp_path / "orbax", "orbax"))
    check_orbax_to_nnx(folder, written, "the duck lays")


@pytest.mark.slow
def test_orbax_to_nnx_on_real_weights(tmp_path):
    folder = convert(plan(SMOLLM2, tmp_path / "hf", "hf", Options(dtype="float32")))
    written = convert(plan(str(folder), tmp_path / "orbax", "orbax"))
    check_orbax_to_nnx(folder, written, "The capital of France is")


def check_orbax_to_nnx(folder: Path, written: Path, prompt: str) -> None:
    file = ROOT / "examples" / "orbax_to_nnx.py"
    assert "jaxsloth" not in re.sub(r'"""[\s\S]*?"""', "", file.read_text(encoding="utf-8"))
    done = subprocess.run([sys.executable, str(file), str(written), prompt], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        want = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].numpy()
    said, numbers = done.stdout.splitlines()[-2:]
    assert said == prompt + tokenizer.decode([int(want.argmax())])
    assert np.abs(np.array(json.loads(numbers)) - want).max() < 2e-5 * np.abs(want).max()
