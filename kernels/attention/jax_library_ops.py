"""Attention through cuDNN, as jax.nn carries it: causal rows, or packed documents gathered into rows of their own.

cuDNN knows no packing that can be relied on (others' paths have attended across documents without a word), so a packed batch is
gathered to ``[documents, longest]``, attended with lengths, and scattered back: exact, and only attention is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxsloth.kernels.attention.xla_ops import attention as general_attention

CUDNN_HEAD_DIM = 128
ATTENDED, STATISTICS, INPUTS = (
    "attended",
    "attention.statistics",
    "attention.inputs",
)  # names under which a checkpointing policy finds what the backward needs


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


def attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    segments: Any,
    documents: Documents | None,
    plain: bool,
    cudnn: bool,
    kernel: Callable[..., Any] | None = None,
) -> Any:
    """``[batch, length, heads, head_dim]``, as the contract says.

    plain: every row is one document, perhaps with padding behind it. documents: those of a packed batch. cudnn: `refuses` said
    None. kernel: an implementation of the op for what cuDNN can't do, which names what it keeps itself (pallas_flash).
    """
    if cudnn and plain:
        return _cudnn(q, k, v, None, scale, window)
    if cudnn and documents is not None:
        heads = [_gather(t, documents) for t in (q, k, v)]
        out = _cudnn(*heads, documents.lengths, scale, window)
        flat = out.reshape(-1, *out.shape[2:])
        return flat.at[documents.rows].get(mode="fill", fill_value=0).reshape(q.shape)
    found = segments if not (plain and causal) else None
    options = {"scale": scale, "causal": causal, "window": window, "soft_cap": soft_cap, "q_segments": found}
    if kernel is not None:
        return kernel(q, k, v, **options)
    return checkpoint_name(general_attention(q, k, v, **options), ATTENDED)


def _gather(x: Any, documents: Documents) -> Any:
    """``[documents, longest, heads, head_dim]`` from ``[batch, length, heads, head_dim]``."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat.at[documents.tokens].get(mode="fill", fill_value=0)


def _library(q: Any, k: Any, v: Any, lengths: Any, scale: float, window: int | None) -> Any:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cudnn(q: Any, k: Any, v: Any, lengths: Any, scale: float, window: int | None) -> Any:
    return _library(q, k, v, lengths, scale, window)


def _forward(q: Any, k: Any, v: Any, lengths: Any, scale: float, window: int | None) -> tuple[Any, Any]:
    out, pull = jax.vjp(lambda q, k, v: _library(q, k, v, lengths, scale, window), q, k, v)
    named = checkpoint_name(out, ATTENDED)
    # The library keeps the output too: it is to be kept once.
    leaves, tree = jax.tree.flatten(pull)

    def name(leaf: Any) -> Any:
        if leaf is out:
            return named
        return checkpoint_name(leaf, STATISTICS if leaf.dtype == jnp.float32 else INPUTS)

    kept = [name(leaf) for leaf in leaves]
    return named, jax.tree.unflatten(tree, kept)


def _backward(scale: float, window: int | None, pull: Any, dout: Any) -> tuple[Any, ...]:
    del scale, window
    return (*pull(dout), None)


_cudnn.defvjp(_forward, _backward)
