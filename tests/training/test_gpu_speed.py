"""tokens_per_s on a GPU: every record against the same steps waited for one by one, timed by a clock that is not the loop's."""

from __future__ import annotations

import time
from typing import Any

import pytest

from jaxsloth.convert.checkpoint import find_checkpoint
from jaxsloth.training.run import build_model, execute, make_plan
from tests.support.tiny import tiny_recipe, write_checkpoint, write_rows

# A step of 6 micro-batches of 8 × 1024 packed tokens takes tenths of a second, handing it over milliseconds.
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
SETTLED = 5  # steps that may compile, record or warm up


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    return write_checkpoint(folder / "model", **WIDE), write_rows(folder / "rows.jsonl", 24_000)


class Waited:
    """A train step that leaves the device idle, and notes what every step took."""

    def __init__(self, step_function: Any, synchronize: Any) -> None:
        self.inner, self.synchronize = step_function, synchronize
        self.seconds: dict[int, float] = {}

    def __call__(self, step_batch: Any, *, step: int, **others: Any) -> Any:
        self.synchronize()
        start = time.perf_counter()
        result = self.inner(step_batch, step=step, **others)
        self.synchronize()
        self.seconds[step + 1] = time.perf_counter() - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.gpu
@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_record_is_within_3_percent_of_the_wall_clock(wide, tmp_path, backend, log_every):
    model_folder, rows = wide

    def run(name: str) -> tuple[Any, Any]:
        recipe = tiny_recipe(
            model_folder,
            rows,
            tmp_path / name,
            data={"path": str(rows), "max_length": 1024, "pad_to_multiple_of": 64, "packing": True},
            backend=backend,
            dtype="bfloat16",
            lora={"r": 16, "alpha": 16},
            batch_size=8,
            accumulation=6,
            steps=22,
            log_every=log_every,
            checkpoints={"output": str(tmp_path / name), "every": 15},
        )
        opened = find_checkpoint(str(model_folder))
        plan = make_plan(recipe, opened)
        return plan, build_model(plan, opened)

    plan, model = run("waited")
    made, synchronize = [], plan.backend.synchronize
    make = model.step
    model.step = lambda *arguments: made.append(Waited(make(*arguments), synchronize)) or made[0]
    execute(plan, model, quiet=True)
    del model
    seconds = made.pop().seconds

    entries = [entry for entry in execute(*run("free"), quiet=True).entries if "loss" in entry]
    assert entries[-1]["step"] == 22
    before = next(entry for entry in entries if entry["step"] >= SETTLED)
    for entry in (one for one in entries if one["step"] > before["step"]):
        steps = range(before["step"] + 1, entry["step"] + 1)
        true = (entry["tokens"] - before["tokens"]) / sum(seconds[step] for step in steps)
        print(f"{backend} step {entry['step']}: {entry['tokens_per_s']:.0f} tokens/s logged, {true:.0f} waited for")
        assert entry["tokens_per_s"] == pytest.approx(true, rel=0.03), entry
        before = entry
