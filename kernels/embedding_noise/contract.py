"""NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise on the embeddings of a training step.

``embedding_noise(key, rows, segments, channels, *, alpha) -> float32 [batch, length, channels]``
    key: two uint32 words ``[2]`` (`dropout.contract.module_key`; traced on JAX, so that a step needs no other program); rows
    ``[batch]`` int32: each row's index in the global batch of its step; segments ``[batch, length]`` int32, which count the
    documents of a row from 1, 0 being padding. Position p and channel c of row b get ``alpha / sqrt(L·channels) · u``: L is the
    number of tokens of the document that p is of, and u in [-1, 1) is ``word / 2**23 - 1``, word being the upper 24 bits of the
    first output word of Threefry-2x32 (Salmon et al. 2011, 20 rounds) at the counter ``(rows[b], p·channels + c)``. Padding
    gets zeros.

So neither padding, packing, accumulation nor the number of devices changes what a token gets. L counts real tokens, as the
paper's own code does; transformers' hook counts the padding of the batch too, and says the same where there is none.
"""

from __future__ import annotations

from jaxsloth.kernels.registry import Implementation, Op

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Threefry's, of 20 rounds
PARITY = 0x1BD11BDA

EMBEDDING_NOISE = Op(
    "embedding_noise",
    (
        Implementation("torch", "torch", "jaxsloth.kernels.embedding_noise.torch_ops:embedding_noise"),
        Implementation("xla", "jax", "jaxsloth.kernels.embedding_noise.xla_ops:embedding_noise"),
    ),
)
OPS = (EMBEDDING_NOISE,)
# The words are equal to the bit; the magnitude is a quotient and a root, which GPUs round in their own way.
RELATIVE = 4e-7
