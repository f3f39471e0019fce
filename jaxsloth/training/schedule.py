"""The learning rate of a step: one function for both backends, equal to transformers' schedulers."""

from __future__ import annotations

import math

from jaxsloth.recipe import ScheduleRecipe


def warmup_steps(total_steps: int, schedule: ScheduleRecipe) -> int:
    """How many steps warm up: as given, or the ratio of all steps, rounded up."""
    return schedule.warmup_steps or math.ceil(total_steps * schedule.warmup_ratio)


def learning_rate(step: int, total_steps: int, peak: float, schedule: ScheduleRecipe) -> float:
    """The rate that optimizer step `step` (from 0) uses.

    It climbs linearly from 0 at step 0 to `peak` at the end of the warm-up, then stays ("constant"), falls linearly to 0 at
    total_steps ("linear"), or along half a cosine ("cosine").
    """
    warmup = warmup_steps(total_steps, schedule)
    if step < warmup:
        return peak * step / max(1, warmup)
    if schedule.kind == "constant":
        return peak
    remaining = max(1, total_steps - warmup)
    if schedule.kind == "linear":
        return peak * max(0.0, (total_steps - step) / remaining)
    progress = (step - warmup) / remaining
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
