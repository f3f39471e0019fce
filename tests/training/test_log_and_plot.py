"""The log of an interrupted run, the plot, and what a run shows."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from jaxsloth.training.log import RunLog, read_log
from jaxsloth.training.plot import plot_losses
from jaxsloth.training.progress import ProgressBar


def test_a_log_goes_on_from_the_checkpoint_s_step(tmp_path):
    file = tmp_path / "log.jsonl"
    log = RunLog(file, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1.0 / step})
    with file.open("a") as cut:
        cut.write('{"step": 6, "lo')  # killed while writing
    again = RunLog(file, 3)
    assert [entry["step"] for entry in again.entries] == [1, 2, 3]
    again.write({"step": 4, "loss": 0.1})
    assert [(entry["step"], entry["loss"]) for entry in read_log(file)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.1)]
    assert RunLog(file, 0).entries == []


@pytest.mark.parametrize(
    "rest",
    [
        b"\0" * 4096,
        b'{"step": 4}\n\xff\xfe\n',
        b'[1]\n{"step": 5}\n',
        b'{"loss": 1.0}\n',
        b'{"step": "4"}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_log_s_garbage_costs_its_tail(tmp_path, rest):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + rest)
    assert [entry["step"] for entry in RunLog(file, 9).entries] == [1, 2, 3] + [4] * rest.startswith(b'{"step": 4}')
    assert b"\0" not in file.read_bytes() and b"\xff" not in file.read_bytes()


def test_losses_keep_every_digit(tmp_path):
    loss = float(np.float32(2.3456789))
    RunLog(tmp_path / "log.jsonl", 0).write({"step": 1, "loss": loss})
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] == loss


def test_a_plot_shows_both_runs_and_the_evaluations(tmp_path):
    steps = list(range(1, 11))
    falling = [3.0 - 0.2 * s for s in steps]
    plot_losses({"torch": (steps, falling)}, tmp_path / "one.png", "a run")
    plot_losses({"torch": (steps, falling), "jax": (steps, falling)}, tmp_path / "two.png", "a run")
    plot_losses({"torch": (steps, falling)}, tmp_path / "points.png", "a run", {"held-out": ([5, 10], [2.5, 1.5])})
    images = {name: imread(tmp_path / f"{name}.png")[..., :3] for name in ("one", "two", "points")}
    assert images["one"].shape[0] >= 600
    assert images["one"].shape[1] >= 1000
    colours = {name: coloured(image) for name, image in images.items()}
    # Equal curves: the second one lies dashed on the first, so neither hides the other.
    assert colours["one"]["blue"] > 3 * colours["two"]["orange"] / 4 > 0
    assert colours["two"]["blue"] > 1000
    assert colours["points"]["orange"] > 500
    assert colours["one"]["orange"] == 0
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".tmp-")] == []


def coloured(image: np.ndarray) -> dict[str, int]:
    """How many pixels are matplotlib's first colour, and its second."""
    red, blue = image[..., 0], image[..., 2]
    return {"blue": int(np.sum(blue - red > 0.3)), "orange": int(np.sum(red - blue > 0.3))}


def test_without_a_terminal_a_run_prints_few_lines():
    out = io.StringIO()
    with ProgressBar(Console(file=out, width=100), 400, 0) as bar:
        for step in range(1, 401):
            bar.on_log({"step": step, "loss": 1.0 / step, "tokens_per_s": 1234.5})
    lines = out.getvalue().splitlines()
    assert len(lines) == 21
    assert lines[-1] == "step 400/400  loss 0.0025  1,234 tokens/s"


def test_on_a_terminal_a_bar_shows_loss_speed_and_time_left():
    out = io.StringIO()
    with ProgressBar(Console(file=out, force_terminal=True, width=120), 10, 4) as bar:
        bar.on_log({"step": 5, "loss": 1.25, "tokens_per_s": 1234.5})
    text = out.getvalue()
    assert "5/10" in text
    assert "loss 1.2500  1,234 tokens/s" in text
    assert "left" in text


def test_lines_are_printed_where_few_steps_are_logged():
    """Every seventh step is logged, and none of them is a twentieth of the run."""
    out = io.StringIO()
    with ProgressBar(Console(file=out, width=100), 400, 0) as bar:
        for step in [*range(7, 401, 7), 400]:
            bar.on_log({"step": step, "loss": 1.0, "tokens_per_s": 1.0})
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in out.getvalue().splitlines()]
    assert steps == [21, 42, 63, 84, 105, 126, 140, 161, 182, 203, 224, 245, 266, 280, 301, 322, 343, 364, 385, 400]


def test_the_time_left_is_to_where_this_part_stops_and_known_for_long_steps():
    """60 s a step, which is longer than what rich looks back; the run has 1000 steps, and this part ends at 10."""
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, get_time=lambda: now[0])
    with ProgressBar(console, 1000, 0, 10) as bar:
        for step in range(1, 7):
            now[0] += 300.0 if step == 1 else 60.0  # the first one compiles
            bar.on_log({"step": step, "loss": 1.25, "tokens_per_s": 1234.5})
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", out.getvalue())
    assert " 6/10 loss" in shown
    assert "left 0:04:00" in shown
