"""L6: an adapter trained by one backend, loaded by the other, by PEFT, and merged into the base: the same logits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxsloth.backend import BACKENDS
from jaxsloth.batch import Batch
from jaxsloth.convert.peft_adapter import read_adapter
from jaxsloth.convert.run import Options, convert, plan_opened
from jaxsloth.parity import bars
from jaxsloth.parity.measure import Measurement, max_abs
from jaxsloth.parity.subjects import Subjects, judge_logits, valid_rows

RUNG = "L6"


def measure(subjects: Subjects, adapters: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Measurement]:
    """adapters: what each backend trained, by PEFT name. The judge of each is PEFT reading the folder that we write."""
    batch = subjects.batch(step=3)
    for trained_by in BACKENDS:
        with subjects.adapter_folder(adapters[trained_by]) as folder:
            _, values = read_adapter(folder)
        peft = subjects.peft(values)
        judge = valid_rows(judge_logits(peft, batch), batch)
        for loaded_by in BACKENDS:
            logits = valid_rows(subjects.ours(loaded_by, values).logits(batch), batch)
            what = f"trained by {trained_by}, loaded by {loaded_by} vs PEFT: max abs logit"
            yield Measurement(RUNG, what, max_abs(logits, judge), bars.L6_MAX_ABS)
        merged = valid_rows(judge_logits(peft.merge_and_unload(), batch), batch)
        what = f"trained by {trained_by}, merged by PEFT vs PEFT: max abs logit"
        yield Measurement(RUNG, what, max_abs(merged, judge), bars.L6_MAX_ABS)
        ours = _merged_by_us(subjects, values, batch)
        what = f"trained by {trained_by}, merged by jaxsloth, loaded by transformers vs PEFT: max abs logit"
        yield Measurement(RUNG, what, max_abs(ours, judge), bars.L6_MAX_ABS)


def _merged_by_us(subjects: Subjects, values: Mapping[str, np.ndarray], batch: Batch) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "merged"
        convert(plan_opened(subjects.checkpoint, subjects.spec, values, target, "hf", Options(dtype="float32")))
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        return valid_rows(judge_logits(model, batch), batch)
