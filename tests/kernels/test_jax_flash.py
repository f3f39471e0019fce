"""Attention in Pallas: against float64 in the interpreter, and lowered for CUDA without a GPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxsloth.kernels.attention import pallas_flash
from jaxsloth.kernels.attention.cases import CASES
from jaxsloth.kernels.registry import Implementation, Op, Target
from jaxsloth.parity.l1_ops import error
from jaxsloth.parity.op_runners import part, prepare, run_jax, run_reference
from tests.support.lowering import lowered_for_cuda

# An interpreted kernel of three loops takes seconds to compile.
FAST = ("grouped", "window_bidirectional", "window_soft_cap_packed", "decode_left_padded", "long_packed_soft_cap")


class Interpreted(Implementation):
    def load(self):
        return partial(pallas_flash.attention, interpret=True)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.name in FAST else pytest.mark.slow) for case in CASES]
)
def test_against_the_reference(case, monkeypatch):
    """Long cases have the kernel's own tiles; in small ones the short cases too meet tiles that are whole, cut and skipped."""
    dtype = "float16" if case.q_length > 100 else "float32"
    if dtype == "float32":
        tiles = tuple(pallas_flash.Tiles(*sizes, 1, 1) for sizes in ((16, 16), (8, 16), (16, 8)))
        monkeypatch.setattr(pallas_flash, "tiles_for", lambda *_: tiles)
    inputs, tolerance = prepare("attention", case, dtype), part("attention", "contract").TOLERANCES[dtype]
    got = run_jax(Op("attention", (Interpreted("interpreted", "jax", ""),)), case, inputs, Target("cpu", dtype))
    for name, expected in run_reference("attention", case, inputs).items():
        bar = tolerance.output if name == "output" else tolerance.gradient
        assert error(got[name], expected) <= bar, f"{name}: {error(got[name], expected):.2e}"


@pytest.mark.parametrize(("head_dim", "packed"), [(64, True), (96, False), (128, True), (256, False)])
def test_it_lowers_for_cuda(head_dim, packed):
    shapes = [jax.ShapeDtypeStruct((2, 1000, heads, head_dim), jnp.bfloat16) for heads in (4, 2, 2)]

    def loss(q, k, v, segments):
        segments = segments if packed else None
        out = pallas_flash.attention(q, k, v, scale=0.1, soft_cap=50.0, window=300, q_segments=segments)
        return out.astype(jnp.float32).sum()

    segments = jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    text = lowered_for_cuda(jax.grad(loss, argnums=(0, 1, 2)), *shapes, segments)
    for kernel in ("flash_forward", "flash_dq", "flash_dkv"):
        assert kernel in text
    assert "triton" in text
