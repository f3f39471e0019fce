"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for the H200's architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jaxsloth.kernels.adamw_8bit import triton_kernel as adamw_8bit_triton
from jaxsloth.kernels.adamw_8bit.contract import BLOCK as MOMENT_BLOCK
from jaxsloth.kernels.attention import flash_kernels, flash_triton
from jaxsloth.kernels.attention import triton_kernel as attention_triton
from jaxsloth.kernels.fp8 import triton_kernel as fp8_triton
from jaxsloth.kernels.fp8.contract import LARGEST, SMALLEST
from jaxsloth.kernels.gated_activation import triton_kernel as gated_triton
from jaxsloth.kernels.gated_activation.contract import KINDS
from jaxsloth.kernels.gumbel import triton_kernel as gumbel_triton
from jaxsloth.kernels.layer_norm import triton_kernel as layer_norm_triton
from jaxsloth.kernels.linear_cross_entropy import triton_kernel as loss_triton
from jaxsloth.kernels.lora_dropout import triton_kernel as lora_dropout_triton
from jaxsloth.kernels.lora_dropout import triton_parts as lora_dropout_parts
from jaxsloth.kernels.lora_matmul import triton_kernel as margins_triton
from jaxsloth.kernels.nf4 import matvec_triton
from jaxsloth.kernels.nf4 import triton_kernel as nf4_triton
from jaxsloth.kernels.nf4.contract import BLOCK, MATVEC_ROWS, NESTED_BLOCK
from jaxsloth.kernels.rms_norm import triton_kernel as rms_norm_triton
from jaxsloth.kernels.rope import triton_kernel as rope_triton

H200 = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a program may have
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
    assert compiled.metadata.shared <= SHARED
    return compiled.asm["ptx"]


def dequantize_ptx(dtype: str, nested: bool, values: str, options: dict[str, object], strided: bool = False) -> str:
    arguments = {
        "codes": "*u8",
        "absmax": "*u8" if nested else "*fp32",
        "table": "*fp32",
        "nested_absmax": "*fp32",
        "nested_code": "*fp32",
        "nested_offset": "*fp32",
        "out": TYPES[dtype],
        "values": values,
        **numbers("blocks", "blocks_a_row", "stride"),
    }
    constants = {"NESTED": nested, "NESTED_SIZE": NESTED_BLOCK, "STRIDED": strided, "WIDE": values == "i64", "WHOLE": strided}
    constants |= {"BLOCK_SIZE": BLOCK, "TILE_BLOCKS": nf4_triton.TILE}
    return compile_ptx(nf4_triton.dequantize_kernel, arguments, constants, options)


@pytest.mark.parametrize("values", ["i32", "i64"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_dequantize_compiles_and_contracts_nothing(dtype, nested, values):
    for strided in (False, True):
        assert "fma.rn.f32" not in dequantize_ptx(dtype, nested, values, nf4_triton.LAUNCH, strided)


def test_contraction_would_be_seen():
    assert "fma.rn.f32" in dequantize_ptx("float32", True, "i32", {**nf4_triton.LAUNCH, "enable_fp_fusion": True})


def pointers(dtype: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, TYPES[dtype])


def numbers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("plain", "adds"), [(False, True), (True, False), (True, True)])
def test_rms_norm_forward_compiles(dtype, plain, adds):
    arguments = {
        **pointers(dtype, "x", "delta", "weight", "total", "y"),
        "rstd": "*fp32",
        **numbers("hidden", "x_stride", "delta_stride", "total_stride", "y_stride"),
        "eps": "fp32",
        "offset": "fp32",
    }
    constants = {"ADDS": adds, "PLAIN": plain, "WIDTH": 1024}
    compile_ptx(rms_norm_triton.forward_kernel, arguments, constants, rms_norm_triton._launch(1024))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("needs", [(True, True, False), (True, False, True), (False, True, False)])
def test_rms_norm_backward_compiles(dtype, needs):
    arguments = {
        **pointers(dtype, "x", "weight"),
        "rstd": "*fp32",
        **pointers(dtype, "dy", "residual", "dx"),
        "dweight": "*fp32",
        **numbers("rows", "hidden", "x_stride", "dy_stride", "residual_stride", "dx_stride", "rows_each"),
        "offset": "fp32",
    }
    constants = {"NEEDS_DX": needs[0], "NEEDS_DWEIGHT": needs[1], "ADDS": needs[2], "WIDTH": 1024}
    compile_ptx(rms_norm_triton.backward_kernel, arguments, constants, rms_norm_triton._launch(1024))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm_compiles(dtype, biased):
    arrays = {**pointers(dtype, "x", "weight", "bias", "y"), "mean": "*fp32", "rstd": "*fp32"}
    constants = {"BIASED": biased, "WIDTH": 1024}
    forward = {**arrays, "hidden": "i32", "eps": "fp32"}
    compile_ptx(layer_norm_triton.forward_kernel, forward, constants, layer_norm_triton.launch(1024))
    backward = {**pointers(dtype, "x", "weight"), "mean": "*fp32", "rstd": "*fp32", **pointers(dtype, "dy", "dx")}
    backward |= {"dweight": "*fp32", "dbias": "*fp32", **numbers("rows", "hidden", "rows_each")}
    constants = {"NEEDS_DX": True, "NEEDS_DWEIGHT": True, "NEEDS_DBIAS": biased, "WIDTH": 1024}
    compile_ptx(layer_norm_triton.backward_kernel, backward, constants, layer_norm_triton.launch(1024))


@pytest.mark.parametrize("listed", [False, True])
def test_gumbel_draws_compile(listed):
    arguments = {"scores": "*fp32", "ids": "*i64" if listed else "*fp32", "keys": "*i64", "rows": "*i32", "positions": "*i32"}
    arguments |= {"values": "*fp32", "places": "*i64", "n": "i32", "share": "i32", "programs": "i32"}
    constants = {"LISTED": listed, "BLOCK": gumbel_triton.BLOCK}
    compile_ptx(gumbel_triton._draw_kernel, arguments, constants, gumbel_triton.WARPS)


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


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rest", [0, 32])
def test_rope_compiles(dtype, rest):
    strides = numbers("q_stride", "k_stride", "q_out_stride", "k_out_stride", "heads", "kv_heads", "head_dim", "half")
    arguments = {**pointers(dtype, "q", "k", "q_out", "k_out"), "cos": "*fp32", "sin": "*fp32", **strides, "sign": "fp32"}
    constants = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "REST": rest}
    compile_ptx(rope_triton.rotate_kernel, arguments, constants, rope_triton.LAUNCH)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation_compiles(dtype, kind):
    forward = {**pointers(dtype, "gate", "up", "h"), **numbers("width", "gate_stride", "up_stride", "h_stride")}
    constants = {"KIND": kind, "SIZE": gated_triton.BLOCK}
    compile_ptx(gated_triton.forward_kernel, forward, constants, gated_triton.LAUNCH)
    names = ("gate", "up", "dh", "dgate", "dup", "h")
    backward = {**pointers(dtype, *names), **numbers("width", *(f"{name}_stride" for name in names))}
    compile_ptx(gated_triton.backward_kernel, backward, constants | {"WRITES_H": True}, gated_triton.LAUNCH)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("capped", "writes", "smoothed"), [(False, True, False), (True, True, True), (False, False, False), (False, True, True)]
)
def test_loss_compiles(dtype, capped, writes, smoothed):
    arguments = {
        "logits": "*fp32",
        "targets": "*i64",
        "losses": "*fp32",
        "dlogits": TYPES[dtype],
        **numbers("vocab", "logits_stride", "dlogits_stride", "ignore_index"),
        "cap": "fp32",
        "smoothing": "fp32",
    }
    constants = {"CAPPED": capped, "SMOOTHED": smoothed, "WRITES": writes, "WIDTH": loss_triton.SIZE}
    compile_ptx(loss_triton.softmax_kernel, arguments, constants, loss_triton.LAUNCH)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_adapter_copy_compiles(dtype):
    arguments = {"table": "*i64", "scales": "*fp32", "like": TYPES[dtype]}
    constants = {"TABLE_FIELDS": margins_triton.FIELDS, "HEIGHT": margins_triton.ROWS, "WIDTH": margins_triton.COLUMNS}
    compile_ptx(margins_triton.place_kernel, arguments, constants, margins_triton.LAUNCH)


DROPOUT_ARGUMENTS = {"key": "*i64", "modules": "*i64", "rows": "*i32"}
DROPOUT_ARGUMENTS |= numbers("tokens", "length", "first", "channels", "share", "ranks")
DROPOUT_CONSTANTS = {"BAR": 3277, "PTX": True, "BLOCKS": 1}


@pytest.mark.parametrize(("dtype", "ranks"), [("bfloat16", 16), ("float16", 64), ("float32", 32)])
def test_lora_dropout_compiles(dtype, ranks):
    kernels = (
        ("project_kernel", lora_dropout_triton.PROJECT, ("x", "a"), ("columns", "x_stride", "a_stride", "steps"), ("parts",)),
        ("input_kernel", lora_dropout_triton.INPUT, ("dx", "g", "a"), ("dx_stride", "g_stride", "a_stride", "count"), ()),
        ("gradient_kernel", lora_dropout_triton.GRADIENT, ("g", "x"), ("columns", "g_stride", "x_stride", "steps"), ("parts",)),
    )
    for name, tiles, matrices, integers, sums in kernels:
        kernel = getattr(lora_dropout_parts, name)
        arguments = DROPOUT_ARGUMENTS | pointers(dtype, *matrices) | numbers(*integers) | dict.fromkeys(sums, "*fp32")
        arguments |= {} if name == "project_kernel" else {"scale": "fp32"}
        constants = DROPOUT_CONSTANTS | {"TOKENS": tiles.tokens, "COUNTERS": tiles.counters}
        constants |= {"RANKS": min(ranks, tiles.ranks)}
        compile_ptx(kernel, arguments, constants, {"num_warps": tiles.warps, "num_stages": tiles.stages})


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, MATVEC_ROWS])
def test_matvec_compiles(dtype, nested, rows):
    levels: dict[str, str] = {}
    for place in range(matvec_triton.WEIGHTS):
        levels |= {f"codes{place}": "*u8", f"absmax{place}": "*u8" if nested else "*fp32"}
        levels |= dict.fromkeys((f"outer{place}", f"offset{place}", f"book{place}"), "*fp32")
    counts = numbers("rows", "x_stride", "row_bytes", "blocks", "blocks_each", "out0", "out1", "out2")
    for outs, split in (((4096,), False), ((28672,), False), ((64,), True)):
        tiles = matvec_triton.tiles_for(rows, 64, outs)
        arguments = {**pointers(dtype, "x"), "y": "*fp32" if split else TYPES[dtype], **pointers(dtype, "bias")}
        arguments |= {"table": "*fp32", **levels, **counts}
        constants = {"NESTED": nested, "NESTED_SIZE": NESTED_BLOCK, "BIASED": not split, "SIZE": BLOCK, "ROWS": rows}
        constants |= {"TILE_OUT": tiles.out, "TILE_BLOCKS": tiles.blocks, **matvec_triton.LOOKUPS}
        options = {**matvec_triton.LAUNCH, "num_warps": tiles.warps}
        assert "shfl.sync.idx" in compile_ptx(matvec_triton.matvec_kernel, arguments, constants, options)


@pytest.mark.parametrize("dtype", TYPES)
def test_matvec_parts_compile(dtype):
    arguments = {"parts": "*fp32", **pointers(dtype, "bias", "y"), **numbers("size", "width")}
    constants = {"BIASED": True, "SPLIT": 8, "SIZE": matvec_triton.REDUCE}
    compile_ptx(matvec_triton.add_parts_kernel, arguments, constants, matvec_triton.REDUCE_LAUNCH)


@pytest.mark.parametrize("dtype", TYPES)
def test_cached_attention_compiles(dtype):
    sizes = numbers("heads", "kv_heads", "head_dim")
    strides = numbers("capacity", "q_stride", "k_stride", "v_stride")
    caches = pointers(dtype, "keys", "values")
    append = {**pointers(dtype, "q", "k", "v"), "cos": "*fp32", "sin": "*fp32", **caches, "slot": "*i64", **sizes}
    append |= {**numbers("half"), **strides}
    for turns in (True, False):
        compile_ptx(attention_triton.append_kernel, append, {"TURNS": turns, "DIM": 128}, attention_triton.SMALL)
    parts = dict.fromkeys(("outs", "peaks", "sums"), "*fp32")
    attend = {**pointers(dtype, "q"), **caches, "first": "*i32", "slot": "*i64", **parts, **sizes}
    attend |= {**numbers("capacity", "span", "q_stride"), "scale": "fp32", "window": "i32", "cap": "fp32"}
    for special in (False, True):
        constants = {"WINDOWED": special, "CAPPED": special, "GROUP": 16, "DIM": 128, "SLOTS": attention_triton.TILE}
        compile_ptx(attention_triton.attend_kernel, attend, constants, attention_triton.LAUNCH)
    join = {**parts, "slot": "*i64", **pointers(dtype, "out"), **numbers("head_dim", "span")}
    compile_ptx(attention_triton.join_kernel, join, {"DIM": 128}, attention_triton.SMALL)


FLASH_STRIDES = {
    "forward": ("q_stride", "k_stride", "v_stride", "out_stride"),
    "dq": ("q_stride", "k_stride", "v_stride", "out_stride", "dout_stride", "dq_stride"),
    "dkv": ("q_stride", "k_stride", "v_stride", "dout_stride", "dk_stride", "dv_stride"),
}


@pytest.mark.parametrize(
    ("dtype", "head_dim", "special"),
    [("bfloat16", 64, True), ("bfloat16", 96, False), ("float16", 128, True), ("bfloat16", 256, False), ("float32", 64, False)],
)
def test_flash_attention_compiles(dtype, head_dim, special):
    """special: segments, an offset on the device, one head, which Triton takes as a constant."""
    data = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"}
    arrays = {
        "forward": ("q", "k", "v", "out", "lse"),
        "dq": ("q", "k", "v", "out", "dout", "lse", "delta", "dq"),
        "dkv": ("q", "k", "v", "dout", "lse", "delta", "dk", "dv"),
    }
    kernels = (flash_kernels.forward_kernel, flash_kernels.dq_kernel, flash_kernels.dkv_kernel)
    tiles = flash_triton.tiles_for(head_dim, getattr(torch, dtype))
    for (name, own), kernel, chosen in zip(arrays.items(), kernels, tiles, strict=True):
        arguments = {array: TYPES[dtype] if array in data else "*fp32" for array in own}
        arguments |= dict.fromkeys(("q_segments", "kv_segments", "extents"), "*i32")
        arguments |= {"q_offset": "*i32" if special else "i32", **numbers(*FLASH_STRIDES[name])}
        arguments |= {
            **numbers("heads", "kv_heads", "q_length", "kv_length", "nearest", "farthest"),
            "scale": "fp32",
            "cap": "fp32",
        }
        constants: dict[str, object] = {"CAPPED": True, "PACKED": special, "TRACED": special, "HEAD_DIM": head_dim}
        constants |= {"DIM": triton.next_power_of_2(head_dim), "QUERIES": chosen.queries, "KEYS": chosen.keys}
        if special:
            constants |= {"heads": 1, "kv_heads": 1, "nearest": 1}
        ptx = compile_ptx(kernel, arguments, constants, dict(chosen.launch))
        assert "wgmma" in ptx or dtype == "float32"
    extents = {**dict.fromkeys(("own", "others", "extents"), "*i32"), **numbers("own_length", "length")}
    compile_ptx(flash_kernels.extent_kernel, extents, {"SIZE": 128, "STEP": flash_triton.LOOKED_AT_ONCE}, {"num_warps": 4})


@pytest.mark.parametrize(("width", "extra"), [(576, 64), (8192, 0), (28672, 64)])
def test_fp8_rows_compile(width, extra):
    arguments = {**pointers("bfloat16", "x", "behind"), "factor": "*fp32", "values": "*fp8e4nv", "scales": "*fp32"}
    arguments |= numbers("width", "extra", "x_stride", "behind_stride")
    once = width <= fp8_triton.WHOLE
    constants = {"EXTENDS": extra > 0, "ONCE": once, "PEAK": LARGEST, "LEAST": SMALLEST}
    constants |= {"SIZE": triton.next_power_of_2(width) if once else fp8_triton.PART, "EXTRA": max(extra, 1)}
    ptx = compile_ptx(fp8_triton.quantize_kernel, arguments, constants, fp8_triton.ROW_LAUNCH)
    assert "cvt.rn.satfinite.e4m3x2" in ptx


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_fp8_weights_compile(nested, transposed):
    arguments = {"codes": "*u8", "absmax": "*u8" if nested else "*fp32"}
    arguments |= dict.fromkeys(("table", "nested_absmax", "nested_code", "nested_offset", "inverse"), "*fp32")
    arguments |= {"target": "*fp8e4nv", **numbers("rows", "row_blocks", "stride")}
    tile_rows, tile_blocks = fp8_triton.TILES[transposed]
    constants = {"NESTED": nested, "NESTED_SIZE": NESTED_BLOCK, "TRANSPOSED": transposed, "BLOCK_SIZE": BLOCK}
    constants |= {"TILE_ROWS": tile_rows, "TILE_BLOCKS": tile_blocks}
    compile_ptx(fp8_triton.nf4_kernel, arguments, constants, fp8_triton.LAUNCH)


@pytest.mark.parametrize("writes", [False, True])
def test_fp8_margins_compile(writes):
    arguments = {"table": "*i64", "scales": "*fp32", "like": "*fp8e4nv"}
    constants = {"WRITES": writes, "PEAK": LARGEST, "TABLE_FIELDS": fp8_triton.FIELDS}
    constants |= {"HEIGHT": fp8_triton.ROWS, "WIDTH": fp8_triton.COLUMNS}
    compile_ptx(fp8_triton.margins_kernel, arguments, constants, fp8_triton.LAUNCH)
