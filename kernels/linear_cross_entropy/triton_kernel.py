"""The head and its loss with the softmax in Triton: a chunk's float32 logits are read twice and their gradient written once.

One program a token. First pass: ``m = max z``, ``s = Σ exp(z - m)``, the loss is ``m + log s - z[target]``; second pass: the
gradient ``exp(z - m)/s - 1[target]``, times ``1 - (z/c)²`` under a soft cap c. Label smoothing e takes ``(1-e)·z[target] +
e·mean z`` in place of ``z[target]``. The products are the library's.
"""

from __future__ import annotations

from functools import partial
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int

from jaxsloth.kernels.linear_cross_entropy.torch_ops import apply_loss

SIZE = 4096
LAUNCH = {"num_warps": 8}


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def _capped(z, cap, CAPPED: tl.constexpr):
    if CAPPED:
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
    return z


@triton.jit
@no_type_check
def softmax_kernel(
    logits,
    targets,
    losses,
    dlogits,
    vocab,
    logits_stride,
    dlogits_stride,
    ignore_index,
    cap,
    smoothing,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WRITES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    valid = target != ignore_index
    column = tl.arange(0, WIDTH)
    # Every lane keeps its own maximum and sum, put together once at the end.
    top = tl.full((WIDTH,), float("-inf"), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    plain = tl.zeros((WIDTH,), tl.float32)
    base = logits + row * logits_stride
    for start in range(0, vocab, WIDTH):
        inside = start + column < vocab
        z = _capped(tl.load(base + start + column, mask=inside, other=0.0), cap, CAPPED)
        if SMOOTHED:
            plain += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, float("-inf"))
        above = tl.maximum(top, z)
        # Lanes past the vocabulary stay at -inf, where a difference would not be a number.
        seen = above > float("-inf")
        total = tl.where(seen, total * tl.exp(top - above) + tl.exp(z - above), 0.0)
        top = above
    highest = tl.max(top, axis=0)
    summed = tl.sum(tl.where(top > float("-inf"), total * tl.exp(top - highest), 0.0), axis=0)
    log_sum = highest + tl.log(summed)
    chosen = tl.where(valid, target, 0)
    picked = _capped(tl.load(base + chosen), cap, CAPPED)
    if SMOOTHED:
        picked = (1.0 - smoothing) * picked + smoothing * (tl.sum(plain, axis=0) / vocab)
    tl.store(losses + row, tl.where(valid, log_sum - picked, 0.0))
    if WRITES:
        for start in range(0, vocab, WIDTH):
            inside = start + column < vocab
            z = _capped(tl.load(base + start + column, mask=inside, other=0.0), cap, CAPPED)
            dlogit = tl.exp(z - log_sum) - tl.where(start + column == chosen, 1.0 - smoothing, 0.0)
            if SMOOTHED:
                dlogit -= smoothing / vocab
            if CAPPED:
                dlogit *= 1.0 - (z / cap) * (z / cap)
            dlogit = tl.where(valid, dlogit, 0.0)
            tl.store(dlogits + row * dlogits_stride + start + column, dlogit.to(dlogits.dtype.element_ty), mask=inside)


def softmax(
    logits: torch.Tensor,
    targets: torch.Tensor,
    soft_cap: float | None,
    ignore_index: int,
    dlogits: torch.Tensor | None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """As torch_ops' function of this name."""
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    written = logits if dlogits is None else dlogits
    if rows > 0:
        with torch.cuda.device_of(logits):
            softmax_kernel[(rows,)](
                logits,
                targets,
                losses,
                written,
                vocab,
                logits.stride(0),
                written.stride(0),
                ignore_index,
                1.0 if soft_cap is None else soft_cap,
                label_smoothing,
                CAPPED=soft_cap is not None,
                SMOOTHED=label_smoothing > 0.0,
                WRITES=dlogits is not None,
                WIDTH=min(SIZE, triton.next_power_of_2(vocab)),
                **LAUNCH,
            )
    return losses


def linear_cross_entropy(
    hidden: Float[torch.Tensor, "tokens width"],
    weight: Float[torch.Tensor, "vocab width"],
    targets: Int[torch.Tensor, " tokens"],
    *,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    per_token: bool = False,
    label_smoothing: float = 0.0,
) -> Float32[torch.Tensor, "*tokens"]:
    """As torch_ops' function of this name, on CUDA."""
    smoothed = partial(softmax, label_smoothing=label_smoothing)
    return apply_loss(hidden, weight, targets, soft_cap, ignore_index, chunk, per_token, smoothed)
