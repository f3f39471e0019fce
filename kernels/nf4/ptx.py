"""The NF4 code book looked up by shuffles, as PTX that Triton and Pallas insert into their kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxsloth.kernels.nf4.contract import CODE

_HALVES_OF_A_WARP = 0x100F  # c of shfl.idx: lanes read within their sixteen, by the low four bits of the code


def lookup(places: Sequence[int]) -> str:
    """PTX that looks up the nibbles of a word: register $i gets, as float32, the value of the four bits from bit places[i] on;
    the word is the register that follows them.

    Each lane of a warp holds one value of the code book, chosen by the bits of its number, and reads the one it needs from
    another lane: no address is formed and no load waits (a lookup in memory takes three instructions, this one two with its
    shift). The assembler chooses once, outside of loops. All lanes must take part.
    """
    lines = [".reg .b32 lane, bit, code, v<15>; .reg .pred p<4>; mov.u32 lane, %laneid;"]
    values, registers = [str(bits) for bits in CODE.view(np.int32)], iter(range(15))
    for n in range(4):
        lines.append(f"and.b32 bit, lane, {1 << n}; setp.ne.u32 p{n}, bit, 0;")
        chosen = []
        for without, with_bit in zip(values[::2], values[1::2], strict=True):
            chosen.append(f"v{next(registers)}")
            lines.append(f"selp.b32 {chosen[-1]}, {with_bit}, {without}, p{n};")
        values = chosen
    for i, place in enumerate(places):
        lines.append(f"shr.u32 code, ${len(places)}, {place};")
        lines.append(f"shfl.sync.idx.b32 ${i}, {values[0]}, code, {_HALVES_OF_A_WARP}, 0xffffffff;")
    return "{ " + " ".join(lines) + " }"


# Of a word's codes in the order of the values they stand for, and of the high and of the low nibbles of its four bytes.
WORD = lookup([8 * byte + place for byte in range(4) for place in (4, 0)])
HIGH, LOW = lookup(range(4, 32, 8)), lookup(range(0, 32, 8))
