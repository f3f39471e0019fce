"""The command line and the front end on a tiny checkpoint, both backends."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jaxsloth import FastLanguageModel, SFTConfig, SFTTrainer
from jaxsloth.cli import main
from jaxsloth.terminal import console
from jaxsloth.training.records import RunResult
from tests.support.tiny import recipe_values, write_checkpoint, write_rows

both = pytest.mark.parametrize("backend", ["torch", "jax"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("front") / "model")


def run(*arguments: str) -> int:
    """A command's exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def write_recipe(folder, checkpoint, **changes):
    import yaml

    values = recipe_values(checkpoint, write_rows(folder / "rows.jsonl"), folder / "out", **changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


@both
def test_train_stop_resume_generate(tmp_path, checkpoint, capsys, backend):
    recipe = write_recipe(tmp_path, checkpoint)
    assert run("train", recipe, "--backend", backend, "--stop-after", "2", "steps=4") == 0
    assert run("train", recipe, "--backend", backend, "steps=4") == 2
    assert "holds another run; go on with --resume" in capsys.readouterr().err
    assert run("train", recipe, "--backend", backend, "--resume", "steps=4", "lora.r=8") == 2
    assert "lora.r: 4 -> 8" in capsys.readouterr().err
    assert run("train", recipe, "--backend", backend, "--resume", "steps=4") == 0
    assert "summary" in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    adapter = str(tmp_path / "out" / "adapter")
    command = ["generate", "--model", str(checkpoint), "--adapter", adapter, "--backend", backend, "--max-new-tokens", "4"]
    assert run(*command, "the duck") == 0
    first = capsys.readouterr().out
    assert run(*command, "the duck") == 0
    assert capsys.readouterr().out == first and first.strip()


@both
def test_generate_answers_as_generation_config_says(tmp_path, checkpoint, capsys, backend):
    """Ends and sampling defaults; what the command line says counts more."""
    folder = tmp_path / "instruct"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)

    def answer(*options, **fields):
        (folder / "generation_config.json").write_text(json.dumps(fields))
        given = ["--model", str(folder), "--backend", backend, "--max-new-tokens", "12", "--raw", *options]
        assert run("generate", *given, "the duck") == 0
        return capsys.readouterr().out[:-1]

    greedy = answer()
    sampled = answer(do_sample=True, temperature=50.0, top_k=0)
    assert sampled != greedy and answer("--seed", "3", do_sample=True, temperature=50.0, top_k=0) != sampled
    assert answer(do_sample=True, temperature=50.0, top_k=1) == greedy
    assert answer("--temperature", "0", do_sample=True, temperature=50.0) == greedy
    assert answer("--top-k", "1", do_sample=True, temperature=50.0) == greedy
    assert answer(eos_token_id=list(range(2, 260))) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "no recipe file at none.yaml"),
        (["generate", "--model", "./nowhere", "hello"], "no file or folder at ./nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_debug_shows_the_error_itself():
    with pytest.raises(ValueError, match="no recipe file"):
        main(["--debug", "train", "none.yaml"])


def test_info_as_json(capsys):
    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"]["nf4_dequantize"]["torch"]["uses"] == "torch"
    assert "NVIDIA GPU" in found["ops"]["nf4_dequantize"]["jax"]["refused"][0]["reason"]
    assert found["packages"]["torch"] and "llama" in found["families"]


@both
def test_what_a_run_says_and_info_tells_is_what_trains(tmp_path, checkpoint, capsys, caplog, backend):
    """One line a run, and none for its ops; autograd is what runs here."""
    from jaxsloth.kernels import registry

    registry._say_once.cache_clear()
    with caplog.at_level("INFO", "jaxsloth"):
        assert run("info", "--json") == 0
        assert caplog.messages == []
        assert json.loads(capsys.readouterr().out)["passes"]["training"][backend]["uses"] == "autograd"
        assert run("train", write_recipe(tmp_path, checkpoint), "--backend", backend, "steps=1", "lora.dropout=0") == 0
    reason = "written is made for NVIDIA GPUs, and runs elsewhere when asked for by name"
    assert caplog.messages == [f"{backend} on cpu runs the autograd training pass ({reason})"]


def test_schema(capsys):
    assert run("schema") == 0
    assert "lora" in json.loads(capsys.readouterr().out)["properties"]


@both
def test_front_end_round_trip(tmp_path, checkpoint, backend):
    model, tokenizer = FastLanguageModel.from_pretrained(str(checkpoint), backend=backend, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    rows = [{"prompt": f"{n}: the duck", "completion": "lays eggs"} for n in range(12)]
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, max_length=64)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer)
    before = trainer.evaluate()["eval_loss"]
    done = trainer.train()
    assert done.global_step == 3 and trainer.evaluate()["eval_loss"] < before
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), backend=backend, load_in_4bit=True)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(["the duck", "a"], max_new_tokens=5) == model.generate(["the duck", "a"], max_new_tokens=5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: FastLanguageModel.from_pretrained(c, load_in_4bits=True), "did you mean 'load_in_4bit'?"),
        (lambda c: FastLanguageModel.from_pretrained(c, torch_dtype="int8"), "dtype must be one of"),
        (
            lambda c: FastLanguageModel.from_pretrained(c, quantization_config=1),
            "other quantizations are not here; give load_in_4bit=True",
        ),
        (lambda c: FastLanguageModel.from_pretrained(c, dtype="int8"), "dtype must be one of"),
        (lambda c: FastLanguageModel.from_pretrained(c, backend="tensorflow"), "backend must be one of"),
    ],
)
def test_wrong_arguments(checkpoint, call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(str(checkpoint))
    assert message in str(caught.value)


def test_a_terminal_without_utf_8_shows_summaries_and_answers(monkeypatch, tmp_path):
    """The stream refuses what is not ASCII; a run's table has an arrow, and an answer may hold anything."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr("sys.stdout", out)
    result = RunResult(2, 5.5, 4.5, None, 100, 2.0, 50, 1.5, None, True, Path("out"), [])
    console().print(result.summary_table())  # as a script's own run does, which has told the stream nothing
    written = out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "5.5000 -> 4.5000" in written and "100 in 2.0 s (100 tokens/s without the first step: 1.5 s)" in written

    loaded = SimpleNamespace(
        model=SimpleNamespace(spec=SimpleNamespace(eos_ids=(1,))),
        tokenizer=SimpleNamespace(eos_token_id=1),
        checkpoint=SimpleNamespace(generation={}),
    )

    def answer(model, tokenizer, texts, settings, on_text):
        on_text(0, "5 × 7 = ¿35?")

    monkeypatch.setattr("jaxsloth.frontend.loading.load", lambda *_, **__: loaded)
    monkeypatch.setattr("jaxsloth.generation.answer_texts", answer)
    assert run("generate", "--model", str(tmp_path), "how much?") == 0
    assert out.buffer.getvalue().decode("ascii").endswith("5 ? 7 = ?35?\n")  # type: ignore[attr-defined]
