"""The benchmarks on tiny shapes: every contender does the same work, and one that breaks stops nobody."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import cliffs, context, decode, facade, ops, packing, step, worker
from benchmarks.agreement import by_layer, difference
from benchmarks.checkpoint import ensure_checkpoint
from benchmarks.contenders import parse_entries
from benchmarks.peers.own import build_options
from benchmarks.rows import ROWS, Row
from benchmarks.work import PEAK_FLOPS, Work, counted_flops, layer_bytes

pytestmark = pytest.mark.slow  # each contender is a process that imports its framework

TINY = Work("tiny", 2, 32, dtype="float32", warmup=1, steps=2)
LABELS = ["jaxsloth-torch", "jaxsloth-jax:full", "hf", "hf:true"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The workers' folder. They run with one thread each: OpenMP's waiting threads make tiny products slow on shared cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def results(scratch):
    """A row with a contender broken in the middle, whose checkpointing is no word of its own."""
    entries = ",".join([*LABELS[:2], "hf:broken", *LABELS[2:]])
    row = step.run_row(Row("step", TINY), entries, scratch, profile=False, timeout=300)
    return {result["label"]: result for result in row["results"]}


def test_a_broken_contender_is_reported_and_stops_nobody(results):
    assert "checkpointing must be 'true' or 'false', got 'broken'" in results["hf:broken"]["error"]
    for label in LABELS:
        assert "error" not in results[label], results[label]
        assert results[label]["median_s"] > 0
        assert len(results[label]["times_s"]) == 3
        assert results[label]["times_hf"] > 0


def test_contenders_do_the_same_work(results):
    """transformers + PEFT + bitsandbytes judge; float32 leaves far less than the bar that bf16 is given."""
    judge = results["hf"]
    assert judge["losses"][-1] < judge["losses"][0]
    for label in LABELS:
        np.testing.assert_allclose(results[label]["losses"], judge["losses"], rtol=1e-5)
        assert len(results[label]["differences"]) == len(LABELS) - 1
        for other, found in results[label]["differences"].items():
            assert found["layer"][0] < 1e-4 and found["tensor"][0] < 1e-4, (label, other, found)


@pytest.mark.parametrize(
    ("theirs", "bar"), [([1.0, 2.0], 0.0), ([1.0, 2.1], 0.05), ([0.0, 0.0], np.inf), ([1.0, np.nan], np.inf)]
)
def test_difference(theirs, bar):
    found, where = difference({"a": np.array([1.0, 2.0])}, {"a": np.array(theirs)})
    assert found == pytest.approx(bar, rel=0.2)
    assert where == ("a" if bar else "")
    assert difference({}, {"a": np.ones(2)})[0] == np.inf


def test_what_is_timed_waits_until_the_next_contender_has_imported(tmp_path, monkeypatch):
    """And for no longer than that, nor for one that is gone."""
    events, file = [], tmp_path / "ready"

    class Runner:
        def step(self, ids):
            events.append(f"step, {file.exists()}")
            return 1.0

    def sleep(seconds):
        events.append("wait")
        file.touch()

    monkeypatch.setattr(worker.time, "sleep", sleep)
    work = replace(TINY, warmup=2, steps=1)
    worker.train(Runner(), work, {"gradients": None}, str(file))
    assert events == ["step, False", "wait", "step, True", "step, True"]
    worker.train(Runner(), work, {"gradients": None}, str(tmp_path / "gone" / "ready"))
    assert events.count("wait") == 1


def test_layers_are_compared_as_one_vector():
    """A small tensor that is all rounding does not decide about its layer; the worst layer decides about the model."""
    theirs = {
        "m.layers.0.q.lora_A": np.array([3.0]),
        "m.layers.0.v.lora_A": np.array([4.0]),
        "m.layers.1.q.lora_A": np.array([2.0]),
    }
    ours = {**theirs, "m.layers.0.q.lora_A": np.array([3.5]), "m.layers.1.q.lora_A": np.array([2.1])}
    assert difference(by_layer(ours), by_layer(theirs)) == (pytest.approx(0.1), ".layers.0")
    assert difference(ours, theirs) == (pytest.approx(0.5 / 3), "m.layers.0.q.lora_A")


def test_contenders_decode_the_same_tokens(scratch):
    rows = {"size": "tiny", "new": 6, "repeat": 1, "adapters": False, "other": True, "dtype": "float32"}
    rows |= {"batches": [2], "prompts": [8], "ways": ["greedy", "top_p", "engine"]}
    decode.ensure_checkpoint("tiny", scratch)
    found = {contender: decode.run(contender, rows, scratch, timeout=300) for contender in ("torch", "jax", "hf")}
    assert not [row for of in found.values() for row in of.values() if "error" in row]
    judge = found["hf"]["greedy, 2 × 8"]["said"]
    assert len(judge) == 6 and all(
        row["tokens_per_s"] > 0 and row["other_s"] > 0 for of in found.values() for row in of.values()
    )
    for of in (found["torch"], found["jax"]):
        assert of["greedy, 2 × 8"]["said"] == of["engine, 2 × 8"]["said"] == judge
    assert found["torch"]["top_p, 2 × 8"]["tokens"] == 6


@pytest.mark.parametrize(("row", "seconds"), [("8b-fast", 0.337), ("8b-recompute", 0.489)])
def test_counted_limit(row, seconds):
    """The limits counted by hand when the peers were measured."""
    chosen = ROWS[row]
    flops = counted_flops(chosen.work)
    assert (flops["step"] + chosen.recompute * flops["recompute"]) / PEAK_FLOPS == pytest.approx(seconds, rel=0.01)


def test_layer_bytes():
    """218.1M weights at 4.127 bits, 1.31M adapter values with gradient and two moments."""
    assert layer_bytes(Work("8b")) == pytest.approx(218_103_808 * 4.127 / 8 + 1_310_720 * 16, rel=1e-4)


def test_options_reach_build_options_or_are_refused():
    assert build_options(TINY.of("full", {})).gradient_checkpointing == "full"
    with pytest.raises(ValueError, match="gradient_checkpointing must be one of"):
        build_options(TINY.of("sometimes", {}))
    with pytest.raises(ValueError, match="no field 'speed'"):
        build_options(TINY.of("full", {"speed": "high"}))
    entry = parse_entries("jaxsloth-jax:full:dtype=float32")[0]
    assert (entry.checkpointing, entry.options) == ("full", {"dtype": "float32"})
    with pytest.raises(ValueError, match="contender must be one of"):
        parse_entries("hf,keras")


@pytest.mark.parametrize("most_that_fits", [64, 700, 5000, 10_000])
def test_longest_context_is_found(monkeypatch, scratch, most_that_fits):
    def run_entry(entry, work, folder, scratch, *, timeout):
        if work.length > most_that_fits:
            return {"error": "out of memory"}
        return {"times_s": [1.0], "peak_bytes": 1}

    monkeypatch.setattr(context, "run_entry", run_entry)
    found = context.longest(parse_entries("hf")[0], TINY, scratch, start=100, most=8192, grain=64, timeout=1)
    if most_that_fits < 100:
        assert found["error"] == "out of memory"
        return
    expected = min(most_that_fits, 8192)
    assert expected - 64 <= found["longest"] <= expected


def test_ops_are_timed_or_say_why_not():
    lines = ops.measure("torch", "tiny", 1, 16, "float32", ["rms_norm", "nf4_dequantize", "lora_matmul"])
    by_name = {(line["op"], line["case"], line["implementation"]): line for line in lines}
    assert "needs an NVIDIA GPU" in by_name["rms_norm", "hidden", "triton"]["error"]
    plain = by_name["rms_norm", "hidden", "torch"]
    assert 0 < plain["forward_ms"] < plain["both_ms"]
    assert by_name["nf4_dequantize", "gate_proj", "torch"]["forward_ms"] > 0
    assert by_name["lora_matmul", "down_proj", "torch"]["both_ms"] > 0


def test_report_files(scratch, tmp_path):
    output = tmp_path / "out" / "step.json"
    step.main(shape="tiny", contenders="floor:full,floor:bad", steps=2, warmup=1, length=16, scratch=scratch, output=output)
    saved = json.loads(output.read_text(encoding="utf-8"))
    good, bad = saved["rows"]["step"]["results"]
    assert good["tokens_per_s"] > 0
    assert "KeyError" in bad["error"]
    assert {"gpu", "driver", "versions", "date", "commit"} <= saved["environment"].keys()
    assert output.with_suffix(".png").stat().st_size > 5000


def test_packed_and_padded_epochs_have_the_same_loss(scratch):
    work = replace(TINY, length=128, steps=1, documents=12)
    padded, packed = packing.run(work, 4, "jaxsloth-torch", scratch, timeout=300)
    assert (padded["tokens"], padded["steps"]) == (packed["tokens"], 3)
    assert packed["loss_difference"] < 1e-5
    assert packed["gain"] > 0


def test_module_and_native_steps_do_the_same_work(scratch, tmp_path):
    output = tmp_path / "facade.json"
    facade.main(shape="tiny", layers=2, length=32, dtype="float32", steps=2, warmup=1, scratch=scratch, output=output)
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rows"].values()
    results = {result["contender"]: result for result in row["results"]}
    for module, native in facade.PAIRS.items():
        assert "error" not in results[module], results[module]
        np.testing.assert_allclose(results[module]["losses"], results[native]["losses"], rtol=1e-5)
        assert results[module]["of_native"] == results[module]["median_s"] / results[native]["median_s"]
        assert all(found["tensor"][0] < 1e-4 for found in results[module]["differences"].values())
    assert "of_native" not in results["jaxsloth-jax"]


@pytest.mark.parametrize("contender", ["torch", "jax"])
def test_a_cliff_is_timed_through_the_users_calls(contender, tmp_path):
    """Rows of two lengths, accumulation and adapters in the upper half, where half of the layers have no backward."""
    ensure_checkpoint("tiny", tmp_path)
    row = cliffs.Cliff("row", lengths=(24, 16), accumulation=2, dtype="float32", upper=True)
    cliffs.ROWS["row"] = row
    cliffs.work(contender, "tiny", ["row"], tmp_path, tmp_path / "result.json", 1, 2)
    del cliffs.ROWS["row"]
    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["row"]
    assert "error" not in found and len(found["losses"]) == 3
    assert found["tokens_per_s"] == pytest.approx(2 * (24 + 16) / found["step_ms"] * 1e3)
    assert found["flops_per_s"] / found["tokens_per_s"] == pytest.approx(cliffs.flops(row, "tiny") / 80)
    whole = cliffs.flops(replace(row, upper=False), "tiny")
    assert 0.6 < cliffs.flops(row, "tiny") / whole < 0.9


def test_ratios_of_cliffs():
    found = {
        "torch": {
            "golden": {"tokens_per_s": 200.0, "flops_per_s": 400.0},
            "dropout": {"tokens_per_s": 150.0, "flops_per_s": 300.0},
        },
        "unsloth": {"golden": {"tokens_per_s": 100.0, "flops_per_s": 200.0}, "dropout": {"error": "none"}},
    }
    cliffs.add_ratios(found)
    assert found["torch"]["golden"]["of_peer"] == 2.0 and found["torch"]["dropout"]["of_golden"] == 0.75
    assert "of_peer" not in found["torch"]["dropout"]
