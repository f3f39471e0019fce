"""Runs recipes one after another, each in a fork of this process, some of which kill themselves: see test_kills.py.

A fork spares the seconds of importing everything. Only torch: JAX starts threads that a fork would lose.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure
from transformers import LlamaConfig, PreTrainedTokenizerFast

from jaxsloth.recipe import make_recipe
from jaxsloth.torch_backend import BACKEND
from jaxsloth.training.run import train


def killer(stage: str, save: int) -> Callable[[str], None]:
    """Kills this process, as nothing can be caught or flushed, at a stage of its `save`-th checkpoint."""
    begun = 0

    def on_stage(now: str) -> None:
        nonlocal begun
        begun += now == "begun"
        if now == stage and begun == save:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_stage


def run(job: dict[str, Any]) -> None:
    on_stage = killer(*job["kill_at"]) if job["kill_at"] else None
    train(make_recipe(job["recipe"]), resume=job["resume"], quiet=True, on_stage=on_stage)


def main() -> None:
    late = (matplotlib.backends.backend_agg, matplotlib.figure, LlamaConfig, PreTrainedTokenizerFast, BACKEND)
    assert all(late)  # what a run imports only when it needs it is imported once, here
    ends = []
    for job in json.loads(sys.stdin.read()):
        child = os.fork()
        if child == 0:
            run(job)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
