"""Dropout masks that depend on what is dropped and on nothing else.

A decision is 16 bits of Philox-4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of a key and a
counter, so the two backends, any accumulation layout and any number of devices draw the same mask. Seven rounds, the fewest
that pass BigCrush in that paper: a round is two wide products and two exclusive ors, and a call makes eight decisions.

``module_key(seed, step, module) -> (k0, k1)`` (here, plain Python ints): the key of one module in one step.
``keep_mask(key, rows, length, channels, *, rate) -> bool [batch, length, channels]``
    key: two uint32 words ``[2]`` (a traced array on JAX; step changes every call and must not recompile); rows ``[batch]``
    int32: the row's index in the global batch of this step. With ``share = ceil(channels / 8)``, channel c of position p in
    row b takes the words at the counter ``(c mod share, p, rows[b], 0)``, and of their eight halves, least significant first,
    the one numbered ``c // share``. An element is kept where that half, as an unsigned integer, is ``>= threshold(rate)``.

So a kernel walks over the first eighth of the channels, draws four words a counter, and applies their halves to eight tiles
of x that lie `share` channels apart: nothing is interleaved. In the first two rounds most factors depend on the token or on
the channel alone, and are formed for those.

Rates are rounded to 1/65536. Kept elements are scaled by ``kept_scale(rate)``, exact for the rounded rate, by the caller.
"""

from __future__ import annotations

import zlib

from jaxsloth.kernels.registry import Implementation, Op

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after every round
ROUNDS = 7
LEVELS = 2**16
HALVES = 8  # decisions of one call


def threshold(rate: float) -> int:
    """Halves of words below this are dropped: ``round(rate * 2**16)``, at most 2**16 - 1.

    Raises:
        ValueError: rate is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"a dropout rate must be in [0, 1), got {rate}")
    return min(round(rate * LEVELS), LEVELS - 1)


def kept_scale(rate: float) -> float:
    """What kept elements are multiplied by, so that the mean stays."""
    return LEVELS / (LEVELS - threshold(rate))


def share_of(channels: int) -> int:
    """Channels that have counters of their own."""
    return -(-channels // HALVES)


def module_word(module: str) -> int:
    """A module's 32-bit name: CRC-32 of its Hugging Face name (``model.layers.0.self_attn.q_proj``)."""
    return zlib.crc32(module.encode())


def step_key(seed: int, step: int) -> tuple[int, int]:
    """The two words that a step contributes, before a module's are mixed in."""
    return seed & 0xFFFFFFFF, ((seed >> 32) ^ step) & 0xFFFFFFFF


def module_key(seed: int, step: int, module: str) -> tuple[int, int]:
    """The key of `module` in `step`: the step's words, the first XORed with the module's word."""
    first, second = step_key(seed, step)
    return first ^ module_word(module), second


KEEP_MASK = Op(
    "dropout_keep_mask",
    (
        Implementation("torch", "torch", "jaxsloth.kernels.dropout.torch_ops:keep_mask"),
        Implementation("xla", "jax", "jaxsloth.kernels.dropout.xla_ops:keep_mask"),
    ),
)
OPS = (KEEP_MASK,)
