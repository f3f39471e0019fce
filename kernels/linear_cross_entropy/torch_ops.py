"""The head and its loss in plain torch: a chunk of tokens at a time, gradient and all, in the forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch.autograd.function import once_differentiable

from jaxsloth.kernels.torch_matmul import matmul_float32

# float32 logits held at once where no chunk is given: 256 MiB of them.
LOGITS_AT_ONCE = 2**26


def default_chunk(tokens: int, vocab: int) -> int:
    """Tokens at a time: as many as `LOGITS_AT_ONCE` logits allow, in chunks of one size, a multiple of 16 below the whole."""
    most = max(LOGITS_AT_ONCE // vocab // 16 * 16, 16)
    even = -(-tokens // max(-(-tokens // most), 1))
    return max(min(-(-even // 16) * 16, most), 16)


Softmax = Callable[..., torch.Tensor]  # `softmax`, or a kernel in its place


def softmax(
    logits: Float32[torch.Tensor, "chunk vocab"],
    targets: Int[torch.Tensor, " chunk"],
    soft_cap: float | None,
    ignore_index: int,
    dlogits: Float[torch.Tensor, "chunk vocab"] | None,
    label_smoothing: float = 0.0,
) -> Float32[torch.Tensor, " chunk"]:
    """The loss of every token, 0 where it is ignored; where `dlogits` is given, the gradient with respect to the logits before
    their cap is written to it, rounded to its dtype. The logits are overwritten."""
    dtanh = None
    if soft_cap is not None:
        tanh = torch.tanh_(logits.div_(soft_cap))
        dtanh = 1.0 - tanh * tanh if dlogits is not None else None
        logits = tanh.mul_(soft_cap)
    valid = targets != ignore_index
    chosen = targets.where(valid, 0).long()[:, None]
    logsumexp = torch.logsumexp(logits, dim=1, keepdim=True)
    wanted = logits.gather(1, chosen)
    if label_smoothing:
        wanted = (1.0 - label_smoothing) * wanted + label_smoothing * logits.mean(dim=1, keepdim=True)
    losses = (logsumexp - wanted)[:, 0].where(valid, 0.0)
    if dlogits is None:
        return losses
    gradient = logits.sub_(logsumexp).exp_()
    gradient.scatter_add_(1, chosen, torch.full_like(logsumexp, label_smoothing - 1.0))
    if label_smoothing:
        gradient.sub_(label_smoothing / logits.shape[1])
    if dtanh is not None:
        gradient.mul_(dtanh)
    dlogits.copy_(gradient.masked_fill_(~valid[:, None], 0.0))
    return losses


@torch.no_grad()
def losses_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    soft_cap: float | None,
    ignore_index: int,
    chunk: int,
    wants: tuple[bool, bool],
    softmax: Softmax,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(every token's loss, dhidden, dweight float32), the gradients where `wants` says so.

    A token's dhidden is of its own loss; dweight is of the losses' sum, each times its own of `factors` (float32 ``[tokens]``).
    """
    wants_hidden, wants_weight = wants
    used = weight.to(hidden.dtype)
    # Where half precision has no float32 product (matmul_float32), the weight is widened once, not once a chunk.
    wide = used if used.is_cuda else used.float()
    losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty_like(hidden) if wants_hidden else None
    dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        tokens = hidden[part]
        logits = matmul_float32(tokens.to(wide.dtype), wide.T)
        dlogits = torch.empty_like(logits, dtype=hidden.dtype) if wants_hidden or wants_weight else None
        losses[part] = softmax(logits, targets[part], soft_cap, ignore_index, dlogits)
        del logits
        if dlogits is None:
            continue
        if dhidden is not None:
            torch.mm(dlogits, used, out=dhidden[part])
        if dweight is not None:
            if factors is not None:
                dlogits.mul_(factors[part, None])
            dweight += matmul_float32(dlogits.T, tokens)
    return losses, dhidden, dweight


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        soft_cap: float | None,
        ignore_index: int,
        chunk: int,
        wants: tuple[bool, bool],
        softmax: Softmax,
    ) -> torch.Tensor:
        losses, dhidden, dweight = losses_and_gradients(hidden, weight, targets, soft_cap, ignore_index, chunk, wants, softmax)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * grads[0]
        if dweight is not None:
            dweight = (dweight * grads[0]).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        soft_cap: float | None,
        ignore_index: int,
        chunk: int,
        wants: tuple[bool, bool],
        softmax: Softmax,
    ) -> torch.Tensor:
        ctx.settings = soft_cap, ignore_index, chunk, (False, True), softmax
        losses, dhidden, _ = losses_and_gradients(
            hidden, weight, targets, soft_cap, ignore_index, chunk, (wants[0], False), softmax
        )
        ctx.save_for_backward(dhidden, *((hidden, weight, targets) if wants[1] else ()))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden, *again = ctx.saved_tensors
        dweight = None
        if dhidden is not None:
            dhidden = (dhidden * grads[0][:, None]).to(dhidden.dtype)
        if again:
            hidden, weight, targets = again
            _, _, total = losses_and_gradients(hidden, weight, targets, *ctx.settings, factors=grads[0])
            assert total is not None
            dweight = total.to(weight.dtype)
        return dhidden, dweight, None, None, None, None, None, None


def apply_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    soft_cap: float | None,
    ignore_index: int,
    chunk: int | None,
    per_token: bool,
    softmax: Softmax,
) -> torch.Tensor:
    """`linear_cross_entropy` with the chunk's softmax given."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if chunk is None:
        chunk = default_chunk(hidden.shape[0], weight.shape[0])
    tracked = torch.is_grad_enabled()
    wants = (tracked and hidden.requires_grad, tracked and weight.requires_grad)
    function = _TokenLosses if per_token else _SummedLoss
    return function.apply(hidden, weight, targets, soft_cap, ignore_index, chunk, wants, softmax)


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
    """The cross entropy of ``hidden·weightᵀ`` against `targets`, summed or per token, with at most `chunk` tokens' logits at a
    time.

    Raises:
        ValueError: chunk is not positive.
    """
    smoothed = partial(softmax, label_smoothing=label_smoothing)
    return apply_loss(hidden, weight, targets, soft_cap, ignore_index, chunk, per_token, smoothed)
