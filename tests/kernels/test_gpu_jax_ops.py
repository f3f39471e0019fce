"""Every JAX implementation of every op on an NVIDIA GPU: the body of test_jax_ops.py, and larger sizes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.kernels.adamw_8bit.cases import CASES as ADAMW_CASES
from jaxsloth.kernels.adamw_8bit.contract import ADAMW_8BIT
from jaxsloth.kernels.attention import pallas_cached, xla_cached
from jaxsloth.kernels.attention.cases import CACHED_CASES, CachedCase
from jaxsloth.kernels.nf4 import xla_ops
from jaxsloth.kernels.nf4.cases import CASES, MATVEC_CASES, MatvecCase, make_inputs
from jaxsloth.kernels.nf4.contract import DEQUANTIZE, MATVEC, NF4
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from tests.kernels.adamw_8bit_checks import check_case, check_each_step_against_bitsandbytes
from tests.kernels.test_adamw_8bit_jax import jax_step
from tests.kernels.test_jax_cached import check_cached_attention
from tests.kernels.test_jax_nf4 import check_matvec, stacked
from tests.kernels.test_jax_ops import DTYPES, OPS, check, part

pytestmark = pytest.mark.gpu


def every_implementation():
    return [
        pytest.param(name, implementation.name, case, id=f"{name}-{implementation.name}-{case.name}")
        for name, op in OPS.items()
        for implementation in op.of("jax")
        for case in part(name, "cases").CASES
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "implementation", "case"), every_implementation())
def test_against_the_reference(name, implementation, case, dtype):
    check(OPS[name], case, dtype, implementation, "cuda")


def on_cpu(quantized: NF4) -> NF4:
    return jax.device_put(quantized, jax.devices("cpu")[0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", DEQUANTIZE.of("jax"), ids=lambda implementation: implementation.name)
def test_dequantize_is_the_cpus(implementation, case, dtype, nested):
    inputs = make_inputs(case, 0)
    offset = jnp.asarray(inputs["offset"]).reshape(()) if nested else None
    quantized = xla_ops.quantize(jnp.asarray(inputs["weight"]), nested=nested, offset=offset)
    got = np.asarray(implementation.load()(quantized, jnp.dtype(dtype)).astype(jnp.float32))
    expected = np.asarray(xla_ops.dequantize(on_cpu(quantized), jnp.dtype(dtype)).astype(jnp.float32))
    assert np.array_equal(got, expected)


# A projection of Llama-3.1-8B.
MODEL_CASES = [MatvecCase(f"{rows}x14336", rows, 14336, (4096,)) for rows in (1, 8)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", [*MATVEC_CASES, *MODEL_CASES], ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", MATVEC.of("jax"), ids=lambda implementation: implementation.name)
def test_matvec(implementation, case, nested):
    check_matvec(implementation.load(), case, nested)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_quantize_is_the_cpus(case, nested):
    inputs = make_inputs(case, 0)
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        weight = jax.device_put(jnp.asarray(inputs["weight"]), device)
        offset = jax.device_put(jnp.asarray(inputs["offset"]).reshape(()), device) if nested else None
        found.append(jax.tree.leaves(xla_ops.quantize(weight, nested=nested, offset=offset)))
    for here, there in zip(*found, strict=True):
        assert np.array_equal(np.asarray(here), np.asarray(there))


@pytest.mark.parametrize("nested", [False, True])
def test_layers_of_a_stack(nested):
    stack, layers = stacked(nested)
    for implementation in DEQUANTIZE.of("jax"):
        for index, one in enumerate(layers):
            got = implementation.load()(stack, jnp.float32, layer=jnp.int32(index))
            assert np.array_equal(np.asarray(got), np.asarray(xla_ops.dequantize(one, jnp.float32)))


def test_rms_norm_of_many_rows_and_again():
    x = jax.random.normal(jax.random.key(0), (100_003, 576), jnp.bfloat16)
    weight = jnp.linspace(0.5, 1.5, 576, dtype=jnp.bfloat16)
    results = []
    for implementation in (*RMS_NORM.of("jax"), RMS_NORM.of("jax")[0]):
        y, pull = jax.vjp(partial(implementation.load(), eps=1e-5), x, weight)
        results.append([np.asarray(a.astype(jnp.float32)) for a in (y, *pull(x))])
    for pallas, xla, again in zip(*results, strict=True):
        assert np.array_equal(pallas, again)
        assert np.linalg.norm(pallas - xla) <= 8e-3 * np.linalg.norm(xla)


# The heads of Llama-3.1-8B, few rows and many (one part); heads that are no power of two; the widest.
LONG_CACHES = (
    CachedCase("long", 9000, 8500, (0, 8000, 17), heads=32, kv_heads=8, head_dim=128, half=64),
    CachedCase("long_many_rows", 600, 555, tuple(range(0, 512, 8)), heads=32, kv_heads=8, head_dim=128, half=64),
    CachedCase("long_96", 1500, 1400, (0, 900), heads=32, kv_heads=32, head_dim=96, half=48),
    CachedCase("long_256", 1500, 1400, (0, 900), heads=8, kv_heads=4, head_dim=256, half=128, window=1024, soft_cap=50.0),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CACHED_CASES, *LONG_CACHES], ids=lambda case: case.name)
@pytest.mark.parametrize("module", [pallas_cached, xla_cached], ids=["pallas", "xla"])
def test_cached_attention(module, case, dtype):
    check_cached_attention(module.append, module.attend, case, dtype, module is pallas_cached)


each_adamw = pytest.mark.parametrize("implementation", ADAMW_8BIT.of("jax"), ids=lambda implementation: implementation.name)


@each_adamw
@pytest.mark.parametrize("case", ADAMW_CASES, ids=lambda case: case.name)
def test_adamw_8bit(implementation, case):
    check_case(jax_step(implementation.load()), case)


@each_adamw
def test_adamw_8bit_is_bitsandbytes_on_a_cpu(implementation):
    check_each_step_against_bitsandbytes(jax_step(implementation.load()))
