"""A draw from a softmax by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): noise is added to the
scores, and the largest sum is the draw. Tokens whose score is -inf are never drawn.

``draw(scores, ids, keys, rows, positions, *, vocab) -> int [batch]``: the place of the drawn score in its row
    scores ``[batch, n]`` float32; ids ``[batch, n]``: the token of each, None where n is the vocabulary in order; keys
    ``[batch, 2]``: two words of 32 bits of a row's seed; rows and positions ``[batch]``: what else its draw is counted by. With
    ``share = ceil(vocab / 4)``, token t of a row takes, of the four words of Philox-4x32 (kernels/dropout) at the counter
    ``(t mod share, position, row, 1)``, the one numbered ``t // share``: a token's noise does not depend on which others are
    in question, nor in what order. (Dropout's counters end in 0.)

The noise of a word w is ``-log(e)``, with ``v = min((float32(w) + 0.5) · 2**-32, 1 - 2**-24)`` and ``e = -log(1 - v)``, which
has an exponential distribution; below 1/16 the logarithm is its series, so that a small e (a large noise) has all its digits.

All of it is float32. The words are equal to the bit everywhere; logarithms are rounded in a library's own way, so two
backends may draw otherwise where two sums lie within a few units in the last place. The first among equal sums is drawn.
"""

from __future__ import annotations

from jaxsloth.kernels.registry import Implementation, Op, needs_cuda

WORDS = 4  # of one call of the generator
DOMAIN = 1  # the last word of its counters
MOST = 1.0 - 2.0**-24  # of v
SERIES_BELOW = 1 / 16
SERIES = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6)  # of -log(1 - v) / v
RELATIVE = 2e-6  # of the noise, beside as much absolutely: it has zeros


def share_of(vocab: int) -> int:
    """Tokens that have counters of their own."""
    return -(-vocab // WORDS)


def seed_words(seed: int) -> tuple[int, int]:
    """The key of a seed, of which 64 bits count."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


DRAW = Op(
    "gumbel_draw",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.gumbel.triton_kernel:draw", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.gumbel.torch_ops:draw"),
        Implementation("xla", "jax", "jaxsloth.kernels.gumbel.xla_ops:draw"),
    ),
)
OPS = (DRAW,)
