"""The 8-bit AdamW step on JAX: against float64, and against bitsandbytes over fifty steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.kernels.adamw_8bit import pallas_kernel, xla_ops
from jaxsloth.kernels.adamw_8bit.cases import CASES, make_inputs
from jaxsloth.kernels.adamw_8bit.contract import ADAMW_8BIT, Moments
from jaxsloth.kernels.registry import Target, select
from tests.kernels.adamw_8bit_checks import (
    STATE,
    Step,
    check_case,
    check_each_step_against_bitsandbytes,
    check_free_run_against_bitsandbytes,
)
from tests.support.lowering import lowered_for_cuda

FUNCTIONS = {"xla": xla_ops.adamw_8bit, "pallas": partial(pallas_kernel.adamw_8bit, interpret=True)}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def jax_step(function: Callable[..., Any]) -> Step:
    """One program a layout, whatever the factors."""
    compiled = jax.jit(function, static_argnames=("sizes", "betas", "eps"))

    def step(arrays: dict[str, np.ndarray], factors: np.ndarray, options: dict[str, Any]) -> dict[str, np.ndarray]:
        moments = Moments(**{name: jnp.asarray(arrays[name]) for name in STATE})
        parameter, after = compiled(
            jnp.asarray(arrays["parameter"]), jnp.asarray(arrays["gradient"]), moments, jnp.asarray(factors), **options
        )
        return {"parameter": np.asarray(parameter), **{name: np.asarray(getattr(after, name)) for name in STATE}}

    return step


@every_function
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_reference(case, name):
    check_case(jax_step(FUNCTIONS[name]), case)


@every_function
def test_each_of_fifty_steps_is_bitsandbytes(name):
    check_each_step_against_bitsandbytes(jax_step(FUNCTIONS[name]))


@every_function
def test_fifty_steps_on_their_own_stay_with_bitsandbytes(name):
    check_free_run_against_bitsandbytes(jax_step(FUNCTIONS[name]), share=1e-3, gap=1e-4)


@every_function
def test_wrong_sizes(name):
    inputs = {key: jnp.asarray(array) for key, array in make_inputs(CASES[0], 0).items()}
    moments = Moments(**{key: inputs[key] for key in STATE})
    with pytest.raises(ValueError, match="make up the parameter"):
        FUNCTIONS[name](
            inputs["parameter"], inputs["gradient"], moments, jnp.ones(3), sizes=(4095,), betas=(0.9, 0.999), eps=1e-8
        )


def test_the_kernel_is_chosen_on_a_gpu_only():
    assert select(ADAMW_8BIT, "jax", Target("cpu")).implementation.name == "xla"
    assert select(ADAMW_8BIT, "jax", Target("cuda")).implementation.name == "pallas"
    assert select(ADAMW_8BIT, "jax", Target("cuda", sizes={"values": 2**31})).implementation.name == "xla"


def test_the_kernel_lowers_for_cuda():
    arrays = {key: jnp.asarray(array) for key, array in make_inputs(CASES[3], 0).items()}
    moments = Moments(**{key: arrays[key] for key in STATE})
    step = partial(pallas_kernel.adamw_8bit, sizes=CASES[3].sizes, betas=(0.9, 0.999), eps=1e-8)
    text = lowered_for_cuda(step, arrays["parameter"], arrays["gradient"], moments, jnp.ones(3))
    assert "adamw_8bit" in text and "triton" in text
