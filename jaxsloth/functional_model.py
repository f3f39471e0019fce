"""What a torch module of a model is made of: the FunctionalModel protocol and what crosses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from jaxsloth.batch import IGNORE, Batch
from jaxsloth.options import CheckpointingName

Output = Literal["loss", "hidden", "logits"]
Weights = Mapping[str, tuple[Any, ...]]
Pullback = Callable[[Any], Weights]


@dataclass(frozen=True)
class Tokens:
    """A batch as a torch module hands it over: int32 ``[batch, length]`` each, on the host, where a pass is planned.

    A query sees the keys that do not come after it, whose kv_segments equal its own segments and are not 0. targets are as in
    `Batch`, None where no loss is asked for. rng_key: the key of this pass' masks, or None to drop nothing.
    """

    input_ids: np.ndarray
    targets: np.ndarray | None
    segments: np.ndarray
    kv_segments: np.ndarray
    positions: np.ndarray
    rng_key: tuple[int, int] | None = None

    @property
    def longest(self) -> int:
        """One more than the last position."""
        return int(self.positions.max(initial=0)) + 1

    def as_batch(self) -> Batch | None:
        """The same rows as a `Batch`, in which all keys that no query sees are padding; what comes out there may differ.

        None where a `Batch` can't say it: such a position has a target, or the tokens that see each other don't stand together.
        """
        segments = np.where(self.kv_segments == 0, 0, self.segments)
        targets = np.full_like(self.input_ids, IGNORE) if self.targets is None else self.targets
        if np.any(segments != self.kv_segments) or np.any((segments == 0) & (targets != IGNORE)):
            return None
        first = segments != 0
        first[:, 1:] &= segments[:, 1:] != segments[:, :-1]
        documents = np.stack([np.nonzero(first)[0], segments[first]])
        if np.unique(documents, axis=1).shape != documents.shape:
            return None
        return Batch(self.input_ids, targets, segments, self.positions, np.arange(len(segments), dtype=np.int32))


@dataclass(frozen=True)
class PassOptions:
    """dropout: the rate on every adapter's input. checkpointing: what is kept for the backward. Of hidden states and logits,
    `count` positions from `first` on are returned; all where count is None."""

    dropout: float = 0.0
    checkpointing: CheckpointingName = "none"
    first: int = 0
    count: int | None = None


class FunctionalModel(Protocol):
    """A model's passes as pure functions of weights that someone else owns: what a torch module of it is made of.

    Adapters come in groups: name of the group -> (A ``[n, r, in]``, B ``[n, out, r]``) float32, scaling folded into B. What
    stands in place of the base's embedding or head, or of a layer's bias, comes under that tensor's own name ->
    (``[vocab, hidden]`` or ``[out]`` float32,), and is read where it lies: a call returns when it has been, and its owner may
    write it then. "loss" is the cross-entropy summed over the targets (float32 scalar), "hidden" the normed states
    ``[batch, length, hidden]`` in the compute dtype (the head is not to be given for them), "logits" float32
    ``[batch, length, vocab]``. Weights, outputs and gradients cross by DLPack.

    A pass is the one that a train step would take, where the batch allows it (`Tokens.as_batch`), else the composed ops. What
    comes out where no query sees the token is then unspecified; a loss takes the composed ops where it is scored.
    """

    device: str  # where results lie: "cpu", "cuda", "cuda:1"

    def groups(self, modules: Sequence[str]) -> Mapping[str, Sequence[str | None]]:
        """How adapters of these layers are to be stacked: name of the group -> its layers, None where one has no adapter
        (must be zero)."""
        ...

    def padded_length(self, length: int) -> int:
        """The length that rows are to be padded to, on the right, so that few programs compile."""
        ...

    def base_weight(self, module: str) -> Any:
        """``[vocab, hidden]`` of the base's embedding or head in the compute dtype: its own memory, not to be written."""
        ...

    def fingerprint(self) -> bytes:
        """32 bytes that differ where any base weight does."""
        ...

    def run(self, output: Output, weights: Weights, batch: Tokens, options: PassOptions) -> Any: ...

    def differentiate(self, output: Output, weights: Weights, batch: Tokens, options: PassOptions) -> tuple[Any, Pullback]:
        """(the output, a function from its cotangent to the gradients of `weights`; of "hidden" and "logits" it may be called
        once)."""
        ...
