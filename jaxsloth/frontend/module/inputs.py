"""A transformers batch as the `Tokens` of a backend, by transformers' rules of masks and positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from jaxsloth.backend import Bridge, Tokens
from jaxsloth.batch import IGNORE

# Arguments that say what the batch says already, or ask for what is given anyway.
_HARMLESS = {"use_cache", "return_dict", "cache_position"}
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}  # position_ids say the same


def refuse_inputs(input_ids: torch.Tensor | None, position_ids: torch.Tensor | None, others: Mapping[str, Any]) -> torch.Tensor:
    """input_ids, where they are ``[batch, length]`` and nothing came with them that would be ignored.

    Raises:
        ValueError: names the argument.
    """
    harmless = _HARMLESS if position_ids is None else _HARMLESS | _PACKING
    for name, value in others.items():
        if name not in harmless and value is not None and value is not False:
            reason = "without position_ids" if name in _PACKING else "which a model of jaxsloth does not take"
            raise ValueError(f"forward got {name} ({type(value).__name__}), {reason}")
    if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
        got = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids must be [batch, length] with at least one token, and {got} came")
    return input_ids


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
) -> Tokens:
    """Padded on the right to the bridge's length.

    A mask says which keys are seen, by every query, as in transformers. Without one, positions tell packed documents apart:
    each begins where they do not go on by one.
    """
    batch, length = input_ids.shape
    longest = length
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device).expand(batch, length)
    else:
        position_ids = position_ids.expand(batch, length)
        longest = int(position_ids.max()) + 1
    if attention_mask is None:
        jumps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
        segments = kv_segments = 1 + jumps.cumsum(-1)
    elif attention_mask.shape == input_ids.shape:
        segments, kv_segments = torch.ones_like(input_ids), attention_mask != 0
    else:
        raise ValueError(f"attention_mask must be {tuple(input_ids.shape)} like input_ids, not {tuple(attention_mask.shape)}")
    if targets is not None and targets.shape != input_ids.shape:
        raise ValueError(f"labels must be {tuple(input_ids.shape)} like input_ids, and they are {tuple(targets.shape)}")
    extra = bridge.padded_length(length) - length

    def padded(tensor: torch.Tensor, value: int = 0) -> torch.Tensor:
        # A copy in any case: the caller may write its tensor while the backend still reads.
        whole = functional.pad(tensor.to(torch.int32), (0, extra), value=value)
        return (whole.clone() if whole.data_ptr() == tensor.data_ptr() else whole.contiguous()).to(bridge.device)

    words = tuple(torch.randint(0, 2**32, (2,)).tolist()) if drops else None
    return Tokens(
        padded(input_ids),
        None if targets is None else padded(targets, IGNORE),
        padded(segments),
        padded(kv_segments),
        padded(position_ids),
        longest,
        words,  # type: ignore[arg-type]
    )
