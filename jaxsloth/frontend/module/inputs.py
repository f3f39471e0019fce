"""A transformers batch as the `Tokens` of a backend, by transformers' rules of masks and positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from jaxsloth.batch import IGNORE, check_ids
from jaxsloth.frontend.arguments import warn_once
from jaxsloth.functional_model import FunctionalModel, Tokens

# Arguments that say what the batch says already, or ask for what is given anyway.
_HARMLESS = {"use_cache", "return_dict", "cache_position", "token_type_ids", "is_causal"}
_BY_CONFIG = ("is_causal", "output_hidden_states", "output_attentions")
# What transformers' generate hands on to every pass, for models that have a use for it.
_HANDED_ON = {"tokenizer", "assistant_tokenizer"}
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # position_ids say the same


def refuse_inputs(input_ids: torch.Tensor | None, position_ids: torch.Tensor | None, others: Mapping[str, Any]) -> torch.Tensor:
    """input_ids, where they are ``[batch, length]`` and nothing came with them that would be ignored. others: what the model's
    config asks of every pass is among them (`asked_by`).

    Raises:
        ValueError: names the argument.
    """
    harmless = _HARMLESS | _HANDED_ON | (_PACKING if position_ids is not None else set())
    if others.get("is_causal") is False:
        raise ValueError("is_causal=False (of forward, or in the model's config): attention here is causal; leave it out")
    for name, value in others.items():
        if name not in harmless and value is not None and value is not False:
            reason = "without position_ids" if name in _PACKING else "which a model of jaxsloth does not take"
            raise ValueError(f"forward got {name} ({type(value).__name__}), {reason}")
    return check_input_ids(input_ids)


def check_input_ids(input_ids: Any) -> torch.Tensor:
    """input_ids, where they are whole numbers ``[batch, length]``; TypeError or ValueError where not."""
    if input_ids is not None and not isinstance(input_ids, torch.Tensor):
        raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}; tokenize with return_tensors='pt'")
    if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
        got = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids must be [batch, length] with at least one token, got {got}")
    check_whole_numbers(input_ids, "input_ids")
    return input_ids


def asked_by(config: Any) -> dict[str, Any]:
    """What a model's config asks of every pass, unless its arguments say otherwise."""
    found = {name: getattr(config, name, None) for name in _BY_CONFIG}
    return {name: value for name, value in found.items() if value is not None}


def check_whole_numbers(tensor: torch.Tensor, name: str) -> None:
    """ValueError for numbers of a dtype that torch would not look up: they would be cut to whole ones."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers (torch.long), got {tensor.dtype}")


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
    functional: FunctionalModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    targets: torch.Tensor | None,
    drops: bool,
    vocab: int,
    packed: bool,
) -> Tokens:
    """On the host, padded on the right to the functional model's length.

    A mask says which keys are seen, by every query, as in transformers. Without one, and where `packed`, positions tell
    documents apart: each begins where they do not go on by one.
    """
    shape = tuple(input_ids.shape)
    _check_shapes(shape, attention_mask, position_ids, targets)
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
    jumps = np.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
    if mask is None and not packed and jumps.any():
        warn_once(
            "position_ids begin anew within a row, and use_cache is on: the row is one document then, as in transformers. "
            "use_cache=False makes each beginning a document of its own"
        )
    if mask is None and packed:
        segments = kv_segments = 1 + jumps.cumsum(axis=1, dtype=np.int32)
    else:
        segments, kv_segments = np.ones(shape, np.int32), np.ones(shape, np.int32) if mask is None else mask
    length = functional.padded_length(shape[1])

    def padded(array: np.ndarray, value: int = 0) -> np.ndarray:
        whole = np.full((shape[0], length), value, np.int32)
        whole[:, : shape[1]] = array
        return whole

    rng_key = tuple(torch.randint(0, 2**32, (2,)).tolist()) if drops else None
    return Tokens(
        padded(ids),
        None if labels is None else padded(labels, IGNORE),
        padded(segments),
        padded(kv_segments),
        padded(positions),
        rng_key,  # type: ignore[arg-type]
    )


def _check_shapes(shape: tuple[int, ...], mask: Any, positions: torch.Tensor | None, targets: torch.Tensor | None) -> None:
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != shape):
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be {shape} like input_ids, got {got}")
    if positions is not None:
        if positions.ndim != 2 or positions.shape[1] != shape[1] or positions.shape[0] not in (1, shape[0]):
            raise ValueError(f"position_ids must be {shape} like input_ids, and they are {tuple(positions.shape)}")
        check_whole_numbers(positions, "position_ids")
    if targets is not None:
        if targets.shape != shape:
            raise ValueError(f"labels must be {shape} like input_ids, and they are {tuple(targets.shape)}")
        check_whole_numbers(targets, "labels")


def _on_host(shape: tuple[int, ...], *tensors: torch.Tensor | None) -> list[np.ndarray | None]:
    """int32 arrays; what lies on a GPU comes in one copy, since each waits for the device."""
    present = [tensor.expand(shape).to(torch.int32) for tensor in tensors if tensor is not None]
    if len({tensor.device for tensor in present}) == 1 and present[0].device.type != "cpu":
        present = list(torch.stack(present).cpu())
    found = iter(present)
    return [None if tensor is None else next(found).cpu().numpy() for tensor in tensors]
