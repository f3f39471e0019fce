"""`jaxsloth evaluate` on a tiny model, against transformers and PEFT: loss, accuracy, answers, base and adapter."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxsloth.cli import main
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.data.encode import encode_rows
from jaxsloth.data.errors import DataError
from jaxsloth.data.sources import load_rows
from jaxsloth.evaluation.metrics import METRICS, EvaluationError, text_scores
from jaxsloth.evaluation.run import EvaluationSettings, data_settings, evaluate
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.transforms import add_lora
from tests.support.tiny import CONFIG, write_checkpoint, write_rows

both = pytest.mark.parametrize("backend", ["torch", "jax"])
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, an adapter that changes what it says, and rows."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_checkpoint(folder / "model")
    spec = add_lora(spec_from_config(CONFIG), r=4, alpha=16)
    generator = np.random.Generator(np.random.Philox(3))
    values = {name: generator.normal(0, 0.1, shape).astype(np.float32) for name, shape in trainable_shapes(spec).items()}
    write_adapter(folder / "adapter", spec, values, str(folder / "model"))
    write_rows(folder / "rows.jsonl", 5)
    return folder


@pytest.fixture(scope="module")
def judged(folder):
    """The same scores through transformers and PEFT, a row at a time."""
    rows = load_rows(str(folder / "rows.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    model = AutoModelForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.float32).eval()
    base = judge(model, tokenizer, rows)
    return {"base": base, "adapter": judge(PeftModel.from_pretrained(model, str(folder / "adapter")).eval(), tokenizer, rows)}


@torch.no_grad()
def judge(model, tokenizer, rows):
    total = right = count = 0.0
    answers = []
    for row, example in zip(rows, encode_rows(rows, tokenizer, data_settings(path="unused")), strict=True):
        ids = torch.tensor(example.tokens[None], dtype=torch.long)
        asked = torch.tensor(example.learn[1:])
        logits, targets = model(input_ids=ids).logits[0, :-1][asked], ids[0, 1:][asked]
        total += torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
        right += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        answers.append(tokenizer.decode(said[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    texts = text_scores(METRICS, answers, [row["completion"] for row in rows])
    return {"loss": total / count, "perplexity": math.exp(total / count), "accuracy": right / count, **texts}, answers


def settings(folder, **changes):
    values = {
        "model": str(folder / "model"),
        "data": data_settings(path=str(folder / "rows.jsonl")),
        "metrics": METRICS,
        "batch_size": 2,
        "max_new_tokens": NEW_TOKENS,
    }
    return EvaluationSettings(**values | changes)


@both
def test_base_and_adapter_as_transformers_and_peft_measure_them(folder, judged, backend):
    shown = Console(file=io.StringIO(), force_terminal=True, width=100)
    found = evaluate(settings(folder, adapter=str(folder / "adapter"), compare_base=True, backend=backend), shown)
    assert found.rows == 5 and list(found.scores) == ["base", "adapter"]
    for stage, (scores, answers) in judged.items():
        assert [answer.answer for answer in found.answers[stage]] == answers
        assert found.scores[stage] == pytest.approx(scores, abs=2e-5, rel=2e-5)
    assert abs(found.change["loss"]) > 0.01, "this adapter changes the model"
    assert found.change["loss"] == found.scores["adapter"]["loss"] - found.scores["base"]["loss"]
    bars = shown.file.getvalue()
    assert "base: loss" in bars and "adapter: answers" in bars and "5/5" in bars


@both
def test_an_adapters_folder_as_the_model(folder, judged, backend):
    found = evaluate(settings(folder, model=str(folder / "adapter"), metrics=["loss"], backend=backend))
    assert list(found.scores) == ["adapter"] and not found.answers and not found.change
    assert found.scores["adapter"]["loss"] == pytest.approx(judged["adapter"][0]["loss"], abs=2e-5)


@both
def test_the_command(folder, judged, tmp_path, capsys, backend):
    file = tmp_path / "new" / "scores.json"
    command = ["evaluate", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--compare-base"]
    command += ["--data", str(folder / "rows.jsonl"), "--metrics", "rouge,bleu,loss,accuracy,f1,exact_match"]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--backend", backend, "--limit", "5", "--json", str(file)]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert not stopped.value.code
    out = capsys.readouterr().out
    for name in ("loss", "perplexity", "accuracy", "exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "change"):
        assert name in out
    assert f"{judged['base'][0]['loss']:.4f}" in out
    written = json.loads(file.read_text())
    assert written["scores"]["adapter"] == pytest.approx(judged["adapter"][0], abs=2e-5, rel=2e-5)
    assert [row["answer"] for row in written["answers"]["base"]] == judged["base"][1]
    with pytest.raises(SystemExit) as again:
        main(command)
    assert again.value.code == 2 and "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["meteor"]}, "metrics must be of"),
        ({"compare_base": True}, "comparing with the base needs an adapter"),
        ({"batch_size": 0}, "must be at least 1"),
    ],
)
def test_what_can_not_be_evaluated(folder, changes, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(settings(folder, **changes))


def test_rows_that_do_not_fit(folder, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "ducks"}\n')
    with pytest.raises(DataError, match=r"row 0 .*no prompt and answer.*measure only loss and accuracy"):
        evaluate(settings(folder, data=data_settings(path=str(file))))
    assert evaluate(settings(folder, data=data_settings(path=str(file)), metrics=["loss"], backend="torch")).rows == 1
    with pytest.raises(EvaluationError, match="format: Input should be"):
        data_settings(path="x", format="xml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--column", "prompt"], "expected=field, such as prompt=question, got 'prompt'"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--adapter", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_one_line(folder, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), *options])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error
