"""The Triton code of LoRA's A behind a dropout; triton_kernel.py launches it.

A tile is some tokens times some counters, the first eighth of the channels; one call of the generator for each makes the
decisions of eight tiles of x that lie an eighth of the channels apart.

Triton lays values out over threads by what is loaded and by the products of matrices. Words that are made of indices alone
would be laid out in a way of their own, and every decision pass through shared memory to where it is needed. So zeros that
Triton takes for functions of what is masked are XORed into them; the assembler, which lays nothing out, sees through that.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from jaxsloth.kernels.dropout.contract import MULTIPLIERS, ROUNDS, WEYL
from jaxsloth.kernels.dropout.triton_parts import wide_product

# Of the pair $1 of 16-bit values those that are kept: all sixteen bits each become the decision's own, the sign of byte 1 (the
# lower half of a word) or 3 of the words $2 and $3.
_SELECT = "{{ .reg .b32 keep; prmt.b32 keep, $2, $3, {}; and.b32 $0, $1, keep; }}"
LOWER, UPPER = _SELECT.format("0xDD99"), _SELECT.format("0xFFBB")
ZERO, TWO_ZEROS = "mov.u32 $0, 0;", "mov.u32 $0, 0; mov.u32 $1, 0;"  # functions of a value and of a pair of 16-bit values

_M0, _M1, _W0, _W1 = (tl.constexpr(value) for value in (*MULTIPLIERS, *WEYL))
_ROUNDS, _LOWER, _UPPER, _ZERO, _TWO_ZEROS = (tl.constexpr(value) for value in (ROUNDS, LOWER, UPPER, ZERO, TWO_ZEROS))


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def _decide(word, BAR: tl.constexpr):
    """Both halves of a word compared with the threshold at once: bits 15 and 31 are set where they reach it."""
    compared = (word & 0x7FFF7FFF) + (0x8000 - BAR % 0x8000) * 0x10001
    return compared | word if BAR < 0x8000 else compared & word


@triton.jit
@no_type_check
def _decisions(key, module, place, first_token, rows, token, tokens, length, zeros, BAR: tl.constexpr):
    """Philox's four words at the counters ``(place, position, row, 0)``, decided: place ``[counters]``, token ``[tokens]``.
    What depends on one of them alone is formed for it alone."""
    k0 = (tl.load(key) ^ tl.load(module)).to(tl.uint32)
    k1 = tl.load(key + 1).to(tl.uint32)
    row = tl.load(rows + (first_token + token) // length, mask=token < tokens, other=0)
    a, b, c = place[None, :].to(tl.uint32), ((first_token + token) % length)[:, None].to(tl.uint32), row[:, None].to(tl.uint32)
    d = tl.zeros_like(a)
    for ROUND in tl.static_range(_ROUNDS):
        a_high, a_low = wide_product(a, _M0)
        c_high, c_low = wide_product(c, _M1)
        a, b, c, d = c_high ^ (b ^ k0), c_low, a_high ^ (d ^ k1), a_low
        if ROUND == 1:  # from here on they are as wide as a tile
            a, c = a ^ zeros, c ^ zeros
        k0 += _W0
        k1 += _W1
    return _decide(a, BAR), _decide(b, BAR), _decide(c, BAR), _decide(d, BAR)


@triton.jit
@no_type_check
def _kept(values, words, PART: tl.constexpr, PTX: tl.constexpr):
    """Values, or zeros where they are dropped; by PTX pairs of 16-bit values at once."""
    word = words[PART // 2]
    if PTX and values.dtype != tl.float32:
        code: tl.constexpr = _UPPER if PART % 2 else _LOWER
        kept = tl.inline_asm_elementwise(code, "=r,r,r,r", [values, word], dtype=values.dtype, is_pure=True, pack=2)
    else:
        kept = tl.where((word & (0x80000000 if PART % 2 else 0x8000)) != 0, values, tl.zeros_like(values))
    return kept


@triton.jit
@no_type_check
def _load_tile(base, row, stride, column, row_inside, column_inside):
    """``base[row, column]``, zeros outside; rows may lie more than 2**31 elements apart."""
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _zeros_like(values, PTX: tl.constexpr):
    """Zeros laid out as values are. PTX: Triton's interpreter runs none, and lays nothing out."""
    if not PTX:
        found = tl.zeros(values.shape, tl.uint32)
    elif values.dtype == tl.float32:
        found = tl.inline_asm_elementwise(_ZERO, "=r,r", [values], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        found = tl.inline_asm_elementwise(_TWO_ZEROS, "=r,=r,r", [values], dtype=tl.uint32, is_pure=True, pack=2)
    return found


@triton.jit
@no_type_check
def project_kernel(
    x, a, parts, key, modules, rows, tokens, length, first, channels, share, ranks, columns, x_stride, a_stride, steps,
    BAR: tl.constexpr, PTX: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, COUNTERS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Programs: (modules times blocks of their ranks, tiles of tokens, parts). parts float32 ``[parts, tokens, columns]``."""
    module, rank = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * RANKS + tl.arange(0, RANKS)
    token, part = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS), tl.program_id(2)
    total = tl.zeros((TOKENS, RANKS), tl.float32)
    a += (module * ranks).to(tl.int64) * a_stride
    for step in range(part * steps, part * steps + steps):
        place = step * COUNTERS + tl.arange(0, COUNTERS)
        zeros = _zeros_like(_load_tile(x, token, x_stride, place, token < tokens, place < share), PTX)
        words = _decisions(key, modules + module, place, first, rows, token, tokens, length, zeros, BAR)
        for PART in tl.static_range(8):
            channel = PART * share + place
            inside = (place < share) & (channel < channels)
            values = _load_tile(x, token, x_stride, channel, token < tokens, inside)
            matrix = _load_tile(a, rank, a_stride, channel, rank < ranks, inside)
            total = tl.dot(_kept(values, words, PART, PTX), tl.trans(matrix), total, input_precision="ieee")
    target = (part * tokens + token).to(tl.int64)[:, None] * columns + (module * ranks + rank)[None, :]
    tl.store(parts + target, total, mask=(token < tokens)[:, None] & (rank < ranks)[None, :])


@triton.jit
@no_type_check
def finish_projection_kernel(
    parts, xa, tokens, columns, pad, xa_stride, scale, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """``xa = scale · Σ parts``, zeros in the columns behind."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH))[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for part in range(PARTS):
        at = parts + (part * tokens + row).to(tl.int64) * columns + column
        total += tl.load(at, mask=(row < tokens) & (column < columns), other=0.0)
    at = xa + row.to(tl.int64) * xa_stride + column
    tl.store(at, (total * scale).to(xa.dtype.element_ty), mask=(row < tokens) & (column < pad))


@triton.jit
@no_type_check
def _input_part(total, words, g, a, place, rank, ranks, channels, share, a_stride, PART: tl.constexpr, PTX: tl.constexpr):
    channel = PART * share + place
    matrix = _load_tile(a, rank, a_stride, channel, rank < ranks, (place < share) & (channel < channels))
    return total + _kept(tl.dot(g, matrix, input_precision="ieee"), words, PART, PTX)


@triton.jit
@no_type_check
def _add_to(dx, total, token, place, tokens, channels, share, dx_stride, scale, PART: tl.constexpr):
    channel = PART * share + place
    inside = (token < tokens)[:, None] & ((place < share) & (channel < channels))[None, :]
    at = dx + token.to(tl.int64)[:, None] * dx_stride + channel[None, :]
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (before + total * scale).to(dx.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def input_kernel(
    dx, g, a, key, modules, rows, tokens, length, first, channels, share, ranks, dx_stride, g_stride, a_stride, scale, count,
    BAR: tl.constexpr, PTX: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, COUNTERS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Programs: (tiles of counters, tiles of tokens); each adds all `count` modules' gradients to its eight tiles of dx."""
    place = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    t0 = tl.zeros((TOKENS, COUNTERS), tl.float32)
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    for index in range(count * BLOCKS):
        module, rank = index // BLOCKS, index % BLOCKS * RANKS + tl.arange(0, RANKS)
        own = _load_tile(g + module * ranks, token, g_stride, rank, token < tokens, rank < ranks)
        at = a + (module * ranks).to(tl.int64) * a_stride
        product = tl.dot(own, _load_tile(at, rank, a_stride, place, rank < ranks, place < share), input_precision="ieee")
        zeros = _zeros_like(product, PTX)
        words = _decisions(key, modules + module, place, first, rows, token, tokens, length, zeros, BAR)
        t0 += _kept(product, words, 0, PTX)
        t1 = _input_part(t1, words, own, at, place, rank, ranks, channels, share, a_stride, 1, PTX)
        t2 = _input_part(t2, words, own, at, place, rank, ranks, channels, share, a_stride, 2, PTX)
        t3 = _input_part(t3, words, own, at, place, rank, ranks, channels, share, a_stride, 3, PTX)
        t4 = _input_part(t4, words, own, at, place, rank, ranks, channels, share, a_stride, 4, PTX)
        t5 = _input_part(t5, words, own, at, place, rank, ranks, channels, share, a_stride, 5, PTX)
        t6 = _input_part(t6, words, own, at, place, rank, ranks, channels, share, a_stride, 6, PTX)
        t7 = _input_part(t7, words, own, at, place, rank, ranks, channels, share, a_stride, 7, PTX)
    _add_to(dx, t0, token, place, tokens, channels, share, dx_stride, scale, 0)
    _add_to(dx, t1, token, place, tokens, channels, share, dx_stride, scale, 1)
    _add_to(dx, t2, token, place, tokens, channels, share, dx_stride, scale, 2)
    _add_to(dx, t3, token, place, tokens, channels, share, dx_stride, scale, 3)
    _add_to(dx, t4, token, place, tokens, channels, share, dx_stride, scale, 4)
    _add_to(dx, t5, token, place, tokens, channels, share, dx_stride, scale, 5)
    _add_to(dx, t6, token, place, tokens, channels, share, dx_stride, scale, 6)
    _add_to(dx, t7, token, place, tokens, channels, share, dx_stride, scale, 7)


@triton.jit
@no_type_check
def _gradient_part(total, words, g, x, token, place, tokens, channels, share, x_stride, PART: tl.constexpr, PTX: tl.constexpr):
    channel = PART * share + place
    values = _load_tile(x, token, x_stride, channel, token < tokens, (place < share) & (channel < channels))
    return tl.dot(g, _kept(values, words, PART, PTX), total, input_precision="ieee")


@triton.jit
@no_type_check
def _store_part(parts, total, rank, place, ranks, channels, share, scale, PART: tl.constexpr):
    channel = PART * share + place
    inside = (rank < ranks)[:, None] & ((place < share) & (channel < channels))[None, :]
    tl.store(parts + rank.to(tl.int64)[:, None] * channels + channel[None, :], total * scale, mask=inside)


@triton.jit
@no_type_check
def gradient_kernel(
    g, x, parts, key, modules, rows, tokens, length, first, channels, share, ranks, columns, g_stride, x_stride, steps, scale,
    BAR: tl.constexpr, PTX: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, COUNTERS: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """Programs: (modules times blocks of their ranks, tiles of counters, parts). parts ``[parts, columns, channels]``."""
    module, rank = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * RANKS + tl.arange(0, RANKS)
    place, part = tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS), tl.program_id(2)
    t0 = tl.zeros((RANKS, COUNTERS), tl.float32)
    t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
    for step in range(part * steps, part * steps + steps):
        token = step * TOKENS + tl.arange(0, TOKENS)
        zeros = _zeros_like(_load_tile(x, token, x_stride, place, token < tokens, place < share), PTX)
        words = _decisions(key, modules + module, place, first, rows, token, tokens, length, zeros, BAR)
        own = tl.trans(_load_tile(g + module * ranks, token, g_stride, rank, token < tokens, rank < ranks))
        t0 = _gradient_part(t0, words, own, x, token, place, tokens, channels, share, x_stride, 0, PTX)
        t1 = _gradient_part(t1, words, own, x, token, place, tokens, channels, share, x_stride, 1, PTX)
        t2 = _gradient_part(t2, words, own, x, token, place, tokens, channels, share, x_stride, 2, PTX)
        t3 = _gradient_part(t3, words, own, x, token, place, tokens, channels, share, x_stride, 3, PTX)
        t4 = _gradient_part(t4, words, own, x, token, place, tokens, channels, share, x_stride, 4, PTX)
        t5 = _gradient_part(t5, words, own, x, token, place, tokens, channels, share, x_stride, 5, PTX)
        t6 = _gradient_part(t6, words, own, x, token, place, tokens, channels, share, x_stride, 6, PTX)
        t7 = _gradient_part(t7, words, own, x, token, place, tokens, channels, share, x_stride, 7, PTX)
    parts += (part * columns + module * ranks).to(tl.int64) * channels
    _store_part(parts, t0, rank, place, ranks, channels, share, scale, 0)
    _store_part(parts, t1, rank, place, ranks, channels, share, scale, 1)
    _store_part(parts, t2, rank, place, ranks, channels, share, scale, 2)
    _store_part(parts, t3, rank, place, ranks, channels, share, scale, 3)
    _store_part(parts, t4, rank, place, ranks, channels, share, scale, 4)
    _store_part(parts, t5, rank, place, ranks, channels, share, scale, 5)
    _store_part(parts, t6, rank, place, ranks, channels, share, scale, 6)
    _store_part(parts, t7, rank, place, ranks, channels, share, scale, 7)


@triton.jit
@no_type_check
def add_parts_kernel(parts, total, size, stride, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """``total += Σ parts``: a part is `size` elements, `stride` apart."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < size
    found = tl.zeros((SIZE,), tl.float32)
    for part in range(PARTS):
        found += tl.load(parts + part * stride + at, mask=inside, other=0.0)
    tl.store(total + at, tl.load(total + at, mask=inside, other=0.0) + found, mask=inside)
