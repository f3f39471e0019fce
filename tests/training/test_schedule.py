"""The learning rate of every step against transformers' schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from jaxsloth.recipe import ScheduleRecipe
from jaxsloth.training.schedule import learning_rate, warmup_steps

THEIR_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("kind", THEIR_NAMES)
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (7, 7), (1, 0), (13, 1)])
def test_every_step_equals_transformers(kind, total, warmup):
    peak = 3e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = get_scheduler(THEIR_NAMES[kind], optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = ScheduleRecipe(kind=kind, warmup_steps=warmup)
    for step in range(total):
        assert learning_rate(step, total, peak, ours) == pytest.approx(theirs.get_last_lr()[0], rel=1e-15, abs=0.0)
        optimizer.step()
        theirs.step()


def test_the_warmup_ratio_rounds_up():
    assert warmup_steps(30, ScheduleRecipe(warmup_ratio=0.05)) == 2
    assert warmup_steps(30, ScheduleRecipe(warmup_steps=7)) == 7
