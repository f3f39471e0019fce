"""What the host knows of a batch before its program runs, and what a program is compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsloth.batch import IGNORE
from jaxsloth.kernels.attention.jax_library_ops import Documents, documents_of, pad_documents


@dataclass(frozen=True)
class Checkpointing:
    """`gradient_checkpointing` resolved, once for a batch: which pass runs, the written one or autograd, and what it keeps for
    its backward: none, selective, full or offload."""

    written: bool
    mode: str


@dataclass(frozen=True)
class ProgramPlan:
    """A static argument of the programs.

    max_targets: of a device's micro-batch. unpacked: every row is one document, perhaps with padding behind it. unrolled: the
    layers are.
    """

    kept: Checkpointing
    max_targets: int
    unpacked: bool
    unrolled: bool = False


def make_plan(
    kept_for: Callable[[int], Checkpointing],
    unrolled: Callable[[str], bool],
    targets: np.ndarray,
    segments: np.ndarray,
    devices: int,
) -> tuple[ProgramPlan, tuple[np.ndarray, ...]]:
    """(the plan of a step batch, the arrays of its documents where it is packed).

    targets and segments ``[micro, batch, length]``. The arrays are a `Documents`' with a leading micro axis; their second axis
    is shared out among the devices as the batch's is. Targets are counted in quarters of the tokens: each count is a program.
    kept_for and unrolled: `ModelState.checkpointing` and `ModelState.unrolled`.
    """
    micros, rows, length = targets.shape
    shares = (micros * devices, rows // devices, length)
    split = targets.reshape(micros, devices, -1)
    tokens = split.shape[-1]
    kept = kept_for(tokens)
    loop = unrolled(kept.mode)
    unit = max(tokens // 4, 16)
    most = int((split != IGNORE).sum(axis=-1).max(initial=1))
    max_targets = min(-(-max(most, 1) // unit) * unit, tokens) if kept.written else tokens
    found = [documents_of(share) for share in segments.reshape(shares)]
    if not kept.written or all(documents is None for documents in found):
        return ProgramPlan(kept, max_targets, kept.written, loop), ()
    packed = [documents or whole_rows(share) for documents, share in zip(found, segments.reshape(shares), strict=True)]
    count, longest = (max(documents.tokens.shape[axis] for documents in packed) for axis in (0, 1))
    same = [pad_documents(documents, count, longest, tokens) for documents in packed]

    def stacked(field: str) -> np.ndarray:
        parts = np.stack([getattr(documents, field) for documents in same])
        return parts.reshape(micros, devices * parts.shape[1], *parts.shape[2:])

    return ProgramPlan(kept, max_targets, False, loop), (stacked("tokens"), stacked("lengths"), stacked("rows"))


def whole_rows(segments: np.ndarray) -> Documents:
    """Rows that are one document each, as documents."""
    rows, length = segments.shape
    index = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    lengths = (segments != 0).sum(axis=1).astype(np.int32)
    seen = np.arange(length) < lengths[:, None]
    return Documents(
        np.where(seen, index, rows * length).astype(np.int32), lengths, np.where(seen, index, rows * length).reshape(-1)
    )


def documents_from(arrays: tuple[Any, ...]) -> Documents | None:
    return Documents(*arrays) if arrays else None
