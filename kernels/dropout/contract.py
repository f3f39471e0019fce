"""Dropout masks that depend on what is dropped and on nothing else.

A mask bit is Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", 20 rounds) of a key and a
counter, so the two backends, any accumulation layout and any number of devices draw the same mask.

``key_words(seed, step, module) -> (k0, k1)`` (here, plain Python ints): the key of one module in one step.
``keep_mask(key, rows, length, channels, *, rate) -> bool [batch, length, channels]``
    key: two uint32 words ``[2]`` (a traced array on JAX; step changes every call and must not recompile); rows ``[batch]``
    int32: the row's index in the global batch of this step; position p and channel c of row b use the counter
    ``(rows[b], p * channels + c)``. An element is kept when the first output word, as an unsigned integer, is
    ``>= threshold(rate)``.

Kept elements are scaled by ``1 / (1 - rate)`` by the caller.
"""

from __future__ import annotations

import zlib

from jaxsloth.kernels.registry import Implementation, Op

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threshold(rate: float) -> int:
    """Words below this are dropped: ``round(rate * 2**32)``, at most 2**32 - 1."""
    return min(round(rate * 2**32), 2**32 - 1)


def module_word(module: str) -> int:
    """A module's 32-bit name: CRC-32 of its Hugging Face name (``model.layers.0.self_attn.q_proj``)."""
    return zlib.crc32(module.encode())


def step_words(seed: int, step: int) -> tuple[int, int]:
    """The two words that a step contributes, before a module's are mixed in."""
    return seed & 0xFFFFFFFF, ((seed >> 32) ^ step) & 0xFFFFFFFF


def key_words(seed: int, step: int, module: str) -> tuple[int, int]:
    """The key of `module` in `step`: the step's words, the first XORed with the module's word."""
    first, second = step_words(seed, step)
    return first ^ module_word(module), second


KEEP_MASK = Op(
    "dropout_keep_mask",
    (
        Implementation("torch", "torch", "jaxsloth.kernels.dropout.torch_ops:keep_mask"),
        Implementation("xla", "jax", "jaxsloth.kernels.dropout.xla_ops:keep_mask"),
    ),
)
OPS = (KEEP_MASK,)
