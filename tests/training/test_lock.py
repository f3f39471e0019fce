"""One run an output folder at a time, and the lock that says so ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsloth.training.lock import LOCK, RunningError, check_free, lock
from jaxsloth.training.run import check_output, train

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from jaxsloth.training.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_run_keeps_others_out_and_a_killed_one_does_not(tiny, tmp_path, holder):
    output = tmp_path / "out"
    message = f"{output} belongs to a run that has not ended: process {holder.pid}; wait for it"
    with pytest.raises(RunningError, match=message), lock(output):
        pass
    for resume in (False, True):
        with pytest.raises(RunningError, match=message):
            check_output(tiny.recipe(output), resume)
    assert (output / LOCK).read_text() == str(holder.pid)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    check_free(output)
    assert check_output(tiny.recipe(output), False) is None  # what the killed one left is no run
    with lock(output):
        assert (output / LOCK).read_text() == str(os.getpid())
    assert not (output / LOCK).exists()


def test_a_process_keeps_itself_out(tmp_path):
    with lock(tmp_path), pytest.raises(RunningError, match=f"process {os.getpid()};"), lock(tmp_path / "." / ""):
        pass
    with lock(tmp_path), pytest.raises(RunningError):  # free after it, and not before
        check_free(tmp_path)


def test_a_run_holds_its_folder_while_it_trains(tiny, tmp_path):
    """And one whose folder was taken between its checks and its first step writes nothing."""
    seen = []

    class Second:
        def on_log(self, entry):
            seen.append((tmp_path / "run" / LOCK).read_text())
            with pytest.raises(RunningError, match=f"process {os.getpid()};"):
                train(tiny.recipe(tmp_path / "run", steps=1), resume=True, quiet=True)

        on_evaluate = on_log

        def on_save(self, step):
            del step

    train(tiny.recipe(tmp_path / "run", steps=1), quiet=True, callbacks=[Second()])
    assert seen == [str(os.getpid())]
    assert not (tmp_path / "run" / LOCK).exists()
