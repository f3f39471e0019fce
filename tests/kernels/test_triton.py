"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for the H200's architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jaxsloth.kernels.adamw_8bit import triton_kernel as adamw_8bit_triton
from jaxsloth.kernels.adamw_8bit.contract import BLOCK as MOMENT_BLOCK
from jaxsloth.kernels.nf4 import triton_kernel as nf4_triton
from jaxsloth.kernels.nf4.contract import BLOCK, NESTED_BLOCK
from jaxsloth.kernels.rms_norm import triton_kernel as rms_norm_triton

H200 = GPUTarget("cuda", 90, 32)
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def test_interpreted():
    """Triton chooses the interpreter when a kernel is defined, so it takes a process of its own."""
    file = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=file.parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def compile_ptx(kernel, arguments: dict[str, str], constants: dict[str, object], options: dict[str, object]) -> str:
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=H200, options=options)
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


def dequantize_ptx(dtype: str, nested: bool, values: str, options: dict[str, object]) -> str:
    arguments = {
        "codes": "*u8",
        "absmax": "*u8" if nested else "*fp32",
        "table": "*fp32",
        "nested_absmax": "*fp32",
        "nested_code": "*fp32",
        "nested_offset": "*fp32",
        "out": TYPES[dtype],
        "values": values,
        "blocks": "i32",
    }
    constants = {"NESTED": nested, "NESTED_SIZE": NESTED_BLOCK, "BLOCK_SIZE": BLOCK, "TILE_BLOCKS": nf4_triton.TILE}
    return compile_ptx(nf4_triton.dequantize_kernel, arguments, constants, options)


@pytest.mark.parametrize("values", ["i32", "i64"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_dequantize_compiles_and_contracts_nothing(dtype, nested, values):
    assert "fma.rn.f32" not in dequantize_ptx(dtype, nested, values, nf4_triton.LAUNCH)


def test_contraction_would_be_seen():
    assert "fma.rn.f32" in dequantize_ptx("float32", True, "i32", {**nf4_triton.LAUNCH, "enable_fp_fusion": True})


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("plain", [False, True])
def test_rms_norm_forward_compiles(dtype, plain):
    arguments = {
        "x": TYPES[dtype],
        "weight": TYPES[dtype],
        "y": TYPES[dtype],
        "rstd": "*fp32",
        "hidden": "i32",
        "eps": "fp32",
        "offset": "fp32",
    }
    compile_ptx(rms_norm_triton.forward_kernel, arguments, {"PLAIN": plain, "WIDTH": 1024}, rms_norm_triton._launch(1024))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_rms_norm_backward_compiles(dtype, needs):
    arguments = {
        **dict.fromkeys(("x", "weight"), TYPES[dtype]),
        "rstd": "*fp32",
        **dict.fromkeys(("dy", "dx"), TYPES[dtype]),
        "dweight": "*fp32",
        **dict.fromkeys(("rows", "hidden", "rows_each"), "i32"),
        "offset": "fp32",
    }
    constants = {"NEEDS_DX": needs[0], "NEEDS_DWEIGHT": needs[1], "WIDTH": 1024}
    compile_ptx(rms_norm_triton.backward_kernel, arguments, constants, rms_norm_triton._launch(1024))


def test_adamw_8bit_compiles_and_contracts_nothing():
    arguments = {
        **dict.fromkeys(("parameter", "gradient"), "*fp32"),
        "exp_avg": "*u8",
        "exp_avg_absmax": "*fp32",
        "exp_avg_sq": "*u8",
        "exp_avg_sq_absmax": "*fp32",
        "factors": "*fp32",
        "edges": "*i64",
        "code": "*fp32",
        "code_sq": "*fp32",
        "lookup": "*u8",
        "lookup_sq": "*u8",
        "blocks": "i32",
        **dict.fromkeys(("keep", "take", "keep_sq", "take_sq", "eps"), "fp32"),
    }
    constants = {"BLOCK_SIZE": MOMENT_BLOCK, "TILE_BLOCKS": adamw_8bit_triton.TILE}
    ptx = compile_ptx(adamw_8bit_triton.step_kernel, arguments, constants, adamw_8bit_triton.LAUNCH)
    assert "fma.rn.f32" not in ptx
