"""How an 8-bit AdamW step is judged: against the float64 formula, and against bitsandbytes over fifty steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from jaxsloth.kernels.adamw_8bit.cases import Case, make_inputs
from jaxsloth.kernels.adamw_8bit.contract import ABSMAX, STEPS, ULPS, UPDATE, Moments, blocks_of, step_factors
from jaxsloth.kernels.adamw_8bit.reference import adamw, dequantize, store

STATE = tuple(field.name for field in fields(Moments))
# (parameter, gradient and the moments by name, factors, {sizes, betas, eps}) -> the parameter and the moments by name
Step = Callable[[dict[str, np.ndarray], np.ndarray, dict[str, Any]], dict[str, np.ndarray]]


def torch_step(function: Callable[..., Any], device: str) -> Step:
    def step(arrays: dict[str, np.ndarray], factors: np.ndarray, options: dict[str, Any]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(array.copy()).to(device) for name, array in arrays.items()}
        moments = Moments(**{name: given[name] for name in STATE})
        parameter, after = function(
            given["parameter"], given["gradient"], moments, torch.from_numpy(factors).to(device), **options
        )
        assert parameter is given["parameter"] and after is moments  # in place
        np.testing.assert_array_equal(given["gradient"].cpu().numpy(), arrays["gradient"])
        return {"parameter": parameter.cpu().numpy(), **{name: getattr(after, name).cpu().numpy() for name in STATE}}

    return step


def check_case(step: Step, case: Case) -> None:
    """One step from the case's state, against float64; and again, to the same bits."""
    inputs = make_inputs(case, 0)
    rates = {"learning_rate": case.learning_rate, "count": case.count, "betas": case.betas, "weight_decay": case.weight_decay}
    arguments = np.array(step_factors(**rates), np.float32), {"sizes": case.sizes, "betas": case.betas, "eps": case.eps}
    got, again = step(inputs, *arguments), step(inputs, *arguments)
    assert got.keys() == {"parameter", *STATE}
    for name, array in got.items():
        assert array.dtype == inputs[name].dtype and array.shape == inputs[name].shape
        assert np.array_equal(array, again[name]), f"{name} changes from run to run"
    value, block = 0, 0
    for size in case.sizes:
        here = {n: slice(block, block + blocks_of(size)) if "absmax" in n else slice(value, value + size) for n in inputs}
        check_tensor(
            {name: torch.from_numpy(array[here[name]]) for name, array in inputs.items()},
            {name: torch.from_numpy(array[here[name]].copy()) for name, array in got.items()},
            {**rates, "eps": case.eps},
        )
        value, block = value + size, block + blocks_of(size)


def check_tensor(inputs: dict[str, torch.Tensor], got: dict[str, torch.Tensor], options: dict[str, Any]) -> None:
    before, gradient = inputs["parameter"].double(), inputs["gradient"].double()
    exp_avg = dequantize(inputs["exp_avg"], inputs["exp_avg_absmax"], True)
    exp_avg_sq = dequantize(inputs["exp_avg_sq"], inputs["exp_avg_sq_absmax"], False)
    parameter, *moments = adamw(before, gradient, exp_avg, exp_avg_sq, **options)
    # What rounding is relative to: the step as it would be if old moment and gradient did not cancel.
    no_decay = {**options, "weight_decay": 0.0}
    step = adamw(torch.zeros_like(before), gradient.abs(), exp_avg.abs(), exp_avg_sq, **no_decay)[0].abs()
    spacing = torch.from_numpy(np.spacing(np.maximum(before.abs().numpy(), parameter.abs().numpy()).astype(np.float32)))
    error = (got["parameter"].double() - parameter).abs()
    allowed = ULPS * spacing + UPDATE * step
    assert (error <= allowed).all(), f"parameter: {(error / allowed).max():.2f} of what is allowed"
    for name, exact, signed in (("exp_avg", moments[0], True), ("exp_avg_sq", moments[1], False)):
        stored = store(exact, signed, STEPS)
        absmax, codes = got[f"{name}_absmax"].double(), got[name].long()
        assert ((absmax - stored.absmax).abs() <= ABSMAX * stored.absmax).all(), f"{name}_absmax"
        assert ((stored.lowest <= codes) & (codes <= stored.highest)).all(), f"{name}: a code that no rounding explains"
        # The bar can be missed: rounding leaves a choice to few.
        assert (stored.lowest == stored.highest).double().mean() > 0.9


@dataclass(frozen=True)
class JudgedStep:
    """A step of bitsandbytes: the flat arrays before it and after it."""

    before: dict[str, np.ndarray]
    gradient: np.ndarray
    after: dict[str, np.ndarray]
    factors: np.ndarray


JUDGED_SIZES = (64 * 64, 5000, 16 * 576, 4096 + 256 * 3 + 1)
JUDGED: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8}


def bitsandbytes_steps(count: int = 50) -> Iterator[JudgedStep]:
    """Steps of bitsandbytes' AdamW8bit on a CPU, with gradients that pull towards noise and a rate that changes."""
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator) * 0.1) for size in JUDGED_SIZES]
    judge = AdamW8bit(parameters, lr=1e-3, betas=JUDGED["betas"], eps=JUDGED["eps"], weight_decay=0.1)
    before = {"parameter": torch.cat([p.detach() for p in parameters]).numpy()}
    for name in STATE:
        before[name] = (
            np.zeros(sum(map(blocks_of, JUDGED_SIZES)), np.float32)
            if "absmax" in name
            else np.zeros(sum(JUDGED_SIZES), np.uint8)
        )
    keys = {"exp_avg": "state1", "exp_avg_absmax": "absmax1", "exp_avg_sq": "state2", "exp_avg_sq_absmax": "absmax2"}
    for step in range(1, count + 1):
        rate = 1e-2 / step**0.5
        judge.param_groups[0]["lr"] = rate
        for parameter in parameters:
            spread = 10.0 ** (torch.rand(parameter.shape, generator=generator) * 4 - 4)
            parameter.grad = (parameter.detach() + torch.randn(parameter.shape, generator=generator)) * spread
        gradient = torch.cat([p.grad for p in parameters]).numpy().copy()
        judge.step()
        after = {"parameter": torch.cat([p.detach() for p in parameters]).numpy().copy()}
        after |= {name: torch.cat([judge.state[p][key] for p in parameters]).numpy().copy() for name, key in keys.items()}
        factors = np.array(step_factors(rate, step, JUDGED["betas"], 0.1), np.float32)
        yield JudgedStep(before, gradient, after, factors)
        before = after


def check_each_step_against_bitsandbytes(step: Step) -> None:
    """Every one of fifty steps, from bitsandbytes' own state: parameters, maxima, and all codes but ties."""
    flips = 0
    for judged in bitsandbytes_steps():
        arrays = {**judged.before, "gradient": judged.gradient}
        got = step(arrays, judged.factors, {"sizes": JUDGED_SIZES, **JUDGED})
        after, before = judged.after, judged.before["parameter"]
        allowed = 2 * np.spacing(np.abs(before)) + 1e-6 * np.abs(after["parameter"] - before)
        assert (np.abs(got["parameter"] - after["parameter"]) <= allowed).all()
        for name in STATE:
            if "absmax" in name:
                np.testing.assert_allclose(got[name], after[name], rtol=ABSMAX, atol=0)
                continue
            apart = np.abs(got[name].astype(np.int64) - after[name])
            assert apart.max() <= 1, name  # a tie goes to a neighbour
            flips += int(np.count_nonzero(apart))
    assert flips <= 2e-5 * 2 * 50 * sum(JUDGED_SIZES), f"{flips} codes differ"


def check_free_run_against_bitsandbytes(step: Step, share: float, gap: float) -> None:
    """Fifty steps on our own state: all but `share` of the codes end as bitsandbytes', parameters within `gap`."""
    state: dict[str, np.ndarray] = {}
    judged = None
    for judged in bitsandbytes_steps():
        state = step(
            {**(state or judged.before), "gradient": judged.gradient}, judged.factors, {"sizes": JUDGED_SIZES, **JUDGED}
        )
    assert judged is not None
    assert np.abs(state["parameter"] - judged.after["parameter"]).max() <= gap
    for name in STATE:
        if "absmax" in name:
            np.testing.assert_allclose(state[name], judged.after[name], rtol=0 if gap == 0 else 1e-2, atol=0)
        else:
            assert np.mean(state[name] != judged.after[name]) <= share, name
