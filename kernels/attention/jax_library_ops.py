"""Attention through cuDNN, as jax.nn carries it: causal rows, or packed documents gathered into rows of their own.

cuDNN knows no packing that can be relied on (others' paths have attended across documents without a word), so a packed batch is
gathered to ``[documents, longest]``, attended with lengths, and scattered back: exact, and only attention is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CUDNN_HEAD_DIM = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed batch stand.

    tokens: int32 ``[documents, longest]``, places in the flat batch, the number of its tokens where there is none. lengths:
    int32 ``[documents]``. rows: int32 ``[tokens]``, each token's place in the flat ``[documents, longest]``, or the number of
    those for a token of padding.
    """

    tokens: Any
    lengths: Any
    rows: Any


def documents_of(segments: np.ndarray) -> Documents | None:
    """The documents of a batch ``[rows, length]``; None where each row is one document, perhaps with padding behind it.

    The count and the longest are rounded up to powers of two, so that few shapes occur.
    """
    rows, length = segments.shape
    padded = segments == 0
    if np.all(padded | (segments == segments[:, :1])) and np.all(np.diff(padded.astype(np.int8), axis=1) >= 0):
        return None
    starts = np.ones((rows, length), bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = np.flatnonzero(starts)
    sizes = np.diff(np.append(first, rows * length))
    real = segments.reshape(-1)[first] != 0
    first, sizes = first[real], sizes[real]
    count, longest = 1 << max(len(first) - 1, 0).bit_length(), min(1 << int(sizes.max(initial=1) - 1).bit_length(), length)
    tokens = np.full((count, longest), rows * length, np.int32)
    places = np.full(rows * length, count * longest, np.int32)
    for document, (start, size) in enumerate(zip(first, sizes, strict=True)):
        tokens[document, :size] = np.arange(start, start + size)
        places[start : start + size] = document * longest + np.arange(size)
    lengths = np.zeros(count, np.int32)
    lengths[: len(sizes)] = sizes
    return Documents(tokens, lengths, places)


def pad_documents(documents: Documents, count: int, longest: int, tokens: int) -> Documents:
    """The same documents in arrays of ``[count, longest]``, for batches that have to agree on a shape."""
    index = np.full((count, longest), tokens, np.int32)
    index[: documents.tokens.shape[0], : documents.tokens.shape[1]] = documents.tokens
    lengths = np.zeros(count, np.int32)
    lengths[: len(documents.lengths)] = documents.lengths
    rows = np.full(tokens, count * longest, np.int32)
    for document in np.flatnonzero(lengths):
        own = index[document, : lengths[document]]
        rows[own] = document * longest + np.arange(lengths[document])
    return Documents(index, lengths, rows)


def refuses(platform: str, dtype: Any, head_dim: int, causal: bool, soft_cap: float | None) -> str | None:
    """Why cuDNN can't do this attention, or None."""
    if platform != "cuda":
        return f"needs an NVIDIA GPU, and the arrays are on {platform}"
    if jnp.dtype(dtype) == jnp.float32:
        return "takes half precision only"
    if not causal or soft_cap is not None:
        return "is used for causal attention without a soft cap"
    return None if head_dim <= CUDNN_HEAD_DIM and head_dim % 8 == 0 else f"has no heads of {head_dim} channels"


@dataclass(frozen=True)
class AttentionSettings:
    """What is fixed about an attention. plain: every row is one document, perhaps with padding behind it. cudnn: `refuses` said
    None. kernel: the implementation of the op for what cuDNN can't do."""

    scale: float
    causal: bool
    window: int | None
    soft_cap: float | None
    plain: bool
    cudnn: bool
    kernel: Callable[..., Any]


def forward(q: Any, k: Any, v: Any, settings: AttentionSettings, segments: Any, documents: Documents | None) -> tuple[Any, ...]:
    """What `backward` needs beside q, k and v ``[batch, length, heads, head_dim]``; `attended` makes the output of it.

    segments int32 ``[batch, length]``; documents: those of a packed batch, None where the rows are plain.
    """
    if not settings.cudnn:
        return (_general(q, k, v, settings, segments),)
    heads = (q, k, v) if documents is None else tuple(_gather(t, documents) for t in (q, k, v))
    out, pull = _library(*heads, documents, settings)
    return (out, *(leaf for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32))


def attended(kept: tuple[Any, ...], shape: tuple[int, ...], settings: AttentionSettings, documents: Documents | None) -> Any:
    """``[batch, length, heads, head_dim]``, which is `shape`."""
    out = kept[0]
    return _scatter(out, documents, shape) if settings.cudnn and documents is not None else out


def backward(
    q: Any,
    k: Any,
    v: Any,
    kept: tuple[Any, ...],
    dout: Any,
    settings: AttentionSettings,
    segments: Any,
    documents: Documents | None,
) -> tuple[Any, Any, Any]:
    """The gradients of q, k and v; kept is what `forward` returned."""
    if not settings.cudnn:
        return jax.vjp(lambda q, k, v: _general(q, k, v, settings, segments), q, k, v)[1](dout)
    heads = (q, k, v) if documents is None else tuple(_gather(t, documents) for t in (q, k, v))
    # The forward that is traced here runs no more: what its pullback would take from it is put in, and the rest is unused.
    out, pull = _library(*heads, documents, settings)
    leaves, tree = jax.tree.flatten(pull)
    statistics = iter(kept[1:])
    own = [kept[0] if leaf is out else next(statistics) if leaf.dtype == jnp.float32 else leaf for leaf in leaves]
    dheads = jax.tree.unflatten(tree, own)(dout if documents is None else _gather(dout, documents))
    return (
        dheads if documents is None else tuple(_scatter(d, documents, t.shape) for d, t in zip(dheads, (q, k, v), strict=True))
    )


def _general(q: Any, k: Any, v: Any, settings: AttentionSettings, segments: Any) -> Any:
    return settings.kernel(
        q,
        k,
        v,
        scale=settings.scale,
        causal=settings.causal,
        window=settings.window,
        soft_cap=settings.soft_cap,
        q_segments=None if settings.plain and settings.causal else segments,
    )


def _gather(x: Any, documents: Documents) -> Any:
    """``[documents, longest, heads, head_dim]`` from ``[batch, length, heads, head_dim]``."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat.at[documents.tokens].get(mode="fill", fill_value=0)


def _scatter(x: Any, documents: Documents, shape: tuple[int, ...]) -> Any:
    """The inverse of `_gather`; zeros for tokens of no document."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat.at[documents.rows].get(mode="fill", fill_value=0).reshape(shape)


def _library(q: Any, k: Any, v: Any, documents: Documents | None, settings: AttentionSettings) -> tuple[Any, Any]:
    """(the output, its pullback), whose leaves are q, k, v, lengths, the output and float32 statistics."""
    lengths = None if documents is None else documents.lengths

    def attention(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=settings.scale,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if settings.window is None else (settings.window - 1, 0),
            implementation="cudnn",
        )

    return jax.vjp(attention, q, k, v)
