"""A transformers batch as the `Tokens` of a backend, by transformers' rules of masks and positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from jaxsloth.batch import IGNORE, check_ids
from jaxsloth.bridge import Bridge, Tokens

# Arguments that say what the batch says already, or ask for what is given anyway.
_HARMLESS = {"use_cache", "return_dict", "cache_position", "token_type_ids"}
# What transformers' generate hands on to every pass, for models that have a use for it.
_HANDED_ON = {"tokenizer", "assistant_tokenizer"}
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # position_ids say the same


def refuse_inputs(input_ids: torch.Tensor | None, position_ids: torch.Tensor | None, others: Mapping[str, Any]) -> torch.Tensor:
    """input_ids, where they are ``[batch, length]`` and nothing came with them that would be ignored.

    Raises:
        ValueError: names the argument.
    """
    harmless = _HARMLESS | _HANDED_ON | (_PACKING if position_ids is not None else set())
    for name, value in others.items():
        if name not in harmless and value is not None and value is not False:
            reason = "without position_ids" if name in _PACKING else "which a model of jaxsloth does not take"
            raise ValueError(f"forward got {name} ({type(value).__name__}), {reason}")
    if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
        got = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids must be [batch, length] with at least one token, got {got}")
    return input_ids


def take_apart(batch: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the fields of a tokenizer's batch that came in the place of its input_ids, as transformers 5 hands it out
    where 4 handed a tensor. What is given by name counts.

    Raises:
        TypeError: the batch has no input_ids, or they are not a tensor.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        got = f"got {type(ids).__name__}" if "input_ids" in batch else f"its fields are {', '.join(batch) or 'none'}"
        raise TypeError(
            f"a batch in the place of input_ids must have input_ids as a tensor, {got}; tokenize with return_tensors='pt'"
        )
    return {**batch, **{name: value for name, value in given.items() if value is not None}}


def shift_labels(labels: torch.Tensor | None) -> torch.Tensor:
    """What each position must predict: the next one's label."""
    assert labels is not None
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def make_tokens(
    bridge: Bridge,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    targets: torch.Tensor | None,
    drops: bool,
    vocab: int,
) -> Tokens:
    """On the host, padded on the right to the bridge's length.

    A mask says which keys are seen, by every query, as in transformers. Without one, positions tell packed documents apart:
    each begins where they do not go on by one.
    """
    shape = tuple(input_ids.shape)
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(f"attention_mask must be {shape} like input_ids, not {tuple(attention_mask.shape)}")
    if targets is not None and targets.shape != shape:
        raise ValueError(f"labels must be {shape} like input_ids, and they are {tuple(targets.shape)}")
    mask = None if attention_mask is None else attention_mask != 0
    # What lies outside is brought beside the vocabulary first, since int32 would wrap it.
    near = input_ids.clamp(-1, vocab), None if targets is None else targets.clamp(IGNORE - 1, vocab)
    ids, mask, positions, labels = _on_host(shape, near[0], mask, position_ids, near[1])
    assert ids is not None
    if ids.min() < 0 or ids.max() >= vocab:
        check_ids(input_ids.cpu().numpy(), vocab)
    if labels is not None and (labels.max() >= vocab or labels.min() < IGNORE or ((labels < 0) & (labels != IGNORE)).any()):
        check_ids(targets.masked_fill(targets == IGNORE, 0).cpu().numpy(), vocab, "labels")  # type: ignore[union-attr]
    if positions is None:
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if mask is None:
        jumps = np.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
        segments = kv_segments = 1 + jumps.cumsum(axis=1, dtype=np.int32)
    else:
        segments, kv_segments = np.ones(shape, np.int32), mask
    length = bridge.padded_length(shape[1])

    def padded(array: np.ndarray, value: int = 0) -> np.ndarray:
        whole = np.full((shape[0], length), value, np.int32)
        whole[:, : shape[1]] = array
        return whole

    words = tuple(torch.randint(0, 2**32, (2,)).tolist()) if drops else None
    return Tokens(
        padded(ids),
        None if labels is None else padded(labels, IGNORE),
        padded(segments),
        padded(kv_segments),
        padded(positions),
        words,  # type: ignore[arg-type]
    )


def _on_host(shape: tuple[int, ...], *tensors: torch.Tensor | None) -> list[np.ndarray | None]:
    """int32 arrays; what lies on a GPU comes in one copy, since each waits for the device."""
    present = [tensor.expand(shape).to(torch.int32) for tensor in tensors if tensor is not None]
    if len({tensor.device for tensor in present}) == 1 and present[0].device.type != "cpu":
        present = list(torch.stack(present).cpu())
    found = iter(present)
    return [None if tensor is None else next(found).cpu().numpy() for tensor in tensors]
