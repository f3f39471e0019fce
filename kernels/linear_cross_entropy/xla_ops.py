"""The head and its loss in JAX: a scan over chunks of tokens that forms the gradient as it goes. On CUDA a chunk's softmax is a
kernel (pallas_kernel.py), elsewhere plain JAX."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxsloth.kernels.jax_platform import platform, precision_of
from jaxsloth.kernels.linear_cross_entropy.pallas_kernel import softmax

LOGITS_AT_ONCE = 2**25


class LossOptions(NamedTuple):
    """What a token's loss is; see the contract."""

    soft_cap: float | None
    ignore_index: int
    label_smoothing: float


def default_chunk(tokens: int, vocab: int) -> int:
    """Tokens at a time: as many as `LOGITS_AT_ONCE` logits allow, a multiple of 16 below the whole."""
    return max(min(tokens, LOGITS_AT_ONCE // vocab // 16 * 16), 16)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def _chunk_loss(
    hidden: Array, weight: Array, targets: Array, kind: LossOptions, wants_gradient: bool = True
) -> tuple[Array, Any]:
    """(every token's loss, its gradient by the logits before the cap ``[chunk, vocab]``, None where a kernel was spared it)."""
    raw, smoothing = _dot(hidden, weight, (1, 1)), kind.label_smoothing
    if platform() == "cuda" and not smoothing:
        return softmax(raw, targets, kind.soft_cap, kind.ignore_index, hidden.dtype if wants_gradient else None)
    logits = raw if kind.soft_cap is None else kind.soft_cap * jnp.tanh(raw / kind.soft_cap)
    valid = targets != kind.ignore_index
    chosen = jnp.where(valid, targets, 0)
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    wanted = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    onehot = jax.lax.broadcasted_iota(chosen.dtype, logits.shape, 1) == chosen[:, None]
    dlogits = jnp.exp(logits - log_sum[:, None])
    if smoothing:
        wanted = (1.0 - smoothing) * wanted + smoothing * logits.mean(axis=-1)
        dlogits = dlogits - ((1.0 - smoothing) * onehot + smoothing / logits.shape[1])
    else:
        dlogits = dlogits - onehot
    losses = jnp.where(valid, log_sum - wanted, 0.0)
    dlogits = jnp.where(valid[:, None], dlogits, 0.0)
    if kind.soft_cap is not None:
        dlogits = dlogits * (1.0 - (logits / kind.soft_cap) ** 2)
    return losses, dlogits


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _loss(hidden: Any, weight: Any, targets: Any, kind: LossOptions, chunk: int, train_weight: bool) -> Array:
    def add(total: Array, part: Any) -> tuple[Array, None]:
        return total + _chunk_loss(part[0], weight, part[1], kind, wants_gradient=False)[0].sum(), None

    chunks = _chunks(hidden, targets, chunk, kind.ignore_index)
    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(hidden: Any, weight: Any, targets: Any, kind: LossOptions, chunk: int, train_weight: bool) -> tuple[Array, Any]:
    def add(carry: Any, part: Any) -> tuple[Any, Array]:
        total, dweight = carry
        losses, dlogits = _chunk_loss(part[0], weight, part[1], kind)
        dlogits = dlogits.astype(hidden.dtype)
        if train_weight:
            dweight = dweight + _dot(dlogits, part[0], (0, 0))
        return (total + losses.sum(), dweight), _dot(dlogits, weight, (1, 0)).astype(hidden.dtype)

    start = jnp.zeros(weight.shape, jnp.float32) if train_weight else None
    chunks = _chunks(hidden, targets, chunk, kind.ignore_index)
    (total, dweight), dhidden = jax.lax.scan(add, (jnp.zeros((), jnp.float32), start), chunks)
    return total, (dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], dweight)


def _backward(kind: LossOptions, chunk: int, train_weight: bool, kept: Any, dy: Array) -> tuple[Any, Any, None]:
    del kind, chunk, train_weight
    dhidden, dweight = kept
    return (dhidden.astype(jnp.float32) * dy).astype(dhidden.dtype), None if dweight is None else dweight * dy, None


_loss.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_losses(hidden: Any, weight: Any, targets: Any, kind: LossOptions, chunk: int, train_weight: bool) -> Array:
    def losses(part: Any) -> Array:
        return _chunk_loss(part[0], weight, part[1], kind, wants_gradient=False)[0]

    return jax.lax.map(losses, _chunks(hidden, targets, chunk, kind.ignore_index)).reshape(-1)[: hidden.shape[0]]


def _tokens_forward(
    hidden: Any, weight: Any, targets: Any, kind: LossOptions, chunk: int, train_weight: bool
) -> tuple[Array, Any]:
    def both(part: Any) -> tuple[Array, Array]:
        losses, dlogits = _chunk_loss(part[0], weight, part[1], kind)
        return losses, _dot(dlogits.astype(hidden.dtype), weight, (1, 0)).astype(hidden.dtype)

    tokens = hidden.shape[0]
    losses, dhidden = jax.lax.map(both, _chunks(hidden, targets, chunk, kind.ignore_index))
    again = (hidden, weight, targets) if train_weight else None
    return losses.reshape(-1)[:tokens], (dhidden.reshape(-1, hidden.shape[1])[:tokens], again)


def _tokens_backward(kind: LossOptions, chunk: int, train_weight: bool, kept: Any, dy: Array) -> tuple[Any, Any, None]:
    dhidden, again = kept
    dhidden = (dhidden.astype(jnp.float32) * dy[:, None]).astype(dhidden.dtype)
    if not train_weight:
        return dhidden, None, None
    hidden, weight, targets = again

    def add(total: Array, part: Any) -> tuple[Array, None]:
        _, dlogits = _chunk_loss(part[0], weight, part[1], kind)
        return total + _dot((dlogits * part[2][:, None]).astype(hidden.dtype), part[0], (0, 0)), None

    factors = jnp.pad(dy, (0, -dy.shape[0] % chunk)).reshape(-1, chunk)
    parts = (*_chunks(hidden, targets, chunk, kind.ignore_index), factors)
    dweight, _ = jax.lax.scan(add, jnp.zeros(weight.shape, jnp.float32), parts)
    return dhidden, dweight, None


_token_losses.defvjp(_tokens_forward, _tokens_backward)


def _chunks(hidden: Array, targets: Array, chunk: int, ignore_index: int) -> tuple[Array, Array]:
    """The tokens as ``[chunks, chunk, …]``, filled up with ignored ones."""
    missing = -hidden.shape[0] % chunk
    hidden = jnp.pad(hidden, ((0, missing), (0, 0)))
    targets = jnp.pad(targets, (0, missing), constant_values=ignore_index)
    return hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk)


def linear_cross_entropy(
    hidden: Float[Array, "tokens width"],
    weight: Float[Array, "vocab width"],
    targets: Int[Array, " tokens"],
    *,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    per_token: bool = False,
    label_smoothing: float = 0.0,
    train_weight: bool = False,
) -> Float32[Array, "*tokens"]:
    """The cross entropy of ``hidden·weightᵀ`` against `targets`, summed or per token, with at most `chunk` tokens' logits at a
    time.

    Args:
        train_weight: also form the gradient of the weight, float32 whatever the weight's dtype.

    Raises:
        ValueError: chunk is not positive.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    tokens, vocab = hidden.shape[0], weight.shape[0]
    size = min(chunk or default_chunk(tokens, vocab), max(tokens, 1))
    if not train_weight:
        weight = jax.lax.stop_gradient(weight)
    function = _token_losses if per_token else _loss
    return function(hidden, weight, targets, LossOptions(soft_cap, ignore_index, label_smoothing), size, train_weight)
