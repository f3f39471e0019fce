"""What transformers' generate keeps as ``past_key_values``: rows that a backend decodes with its own KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from jaxsloth.backend import DecodeState, Model
from jaxsloth.batch import check_ids


class CachedRows:
    """A `transformers.Cache` to those who ask for its length or its rows in another order. The adapters of `model` count.

    capacity: tokens a row in all.
    """

    is_compileable = False  # the backend has compiled what it runs

    def __init__(self, model: Model, capacity: int) -> None:
        self._model, self._capacity, self._length = model, capacity, 0
        self._state: DecodeState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def append(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The prompts, padded on the left where the mask says so, and from then on one token a row: ``[batch, length]``.

        Returns:
            The logits that follow, float32 ``[batch, 1, vocab]``, on the tokens' device.

        Raises:
            ValueError: more than one token a row after the prompts.
        """
        tokens = check_ids(input_ids.cpu().numpy(), self._model.spec.embedding.vocab)
        batch, count = tokens.shape
        if self._state is None:
            lengths = np.full(batch, count, np.int32)
            if attention_mask is not None:
                lengths = (attention_mask != 0).sum(dim=1).cpu().numpy().astype(np.int32)
            self._state, logits = self._model.start_decode(tokens, lengths, self._capacity)
        elif count == 1:
            logits = self._state.step(tokens[:, 0])
        else:
            raise ValueError(f"rows go on by one token at a time, and {count} came; generate with use_cache=False")
        self._length += count
        return torch.tensor(logits, device=input_ids.device)[:, None]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on from what row beam_idx[i] was."""
        assert self._state is not None
        self._state.reorder(beam_idx.cpu().numpy())


class WholeRows:
    """A `transformers.Cache` that keeps tokens alone: every pass runs the rows whole, so that several tokens can be tried at
    once and taken back, as assisted generation does.

    run: the logits of all positions of ``[batch, length]`` tokens under a mask of the same shape.
    """

    is_compileable = False

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> None:
        self._run, self._ids = run, torch.empty(0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._ids.shape[-1]

    def append(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Tokens behind those that are kept; the logits that follow each of the new ones."""
        self._ids = torch.cat([self._ids, input_ids], dim=1) if self.get_seq_length() else input_ids
        return self._run(self._ids, attention_mask)[:, -input_ids.shape[1] :]

    def activate_past_recording(self) -> None:
        """Tokens are kept in any case."""

    def crop(self, tokens: int) -> None:
        """Takes the last -tokens back; a positive number is how many stay."""
        if tokens:
            self._ids = self._ids[:, :tokens]


def follows_on(inputs: Mapping[str, Any]) -> bool:
    """Whether prompts come as `CachedRows` takes them: nothing cached yet, padded on the left at most, in plain positions.

    inputs: transformers' attention_mask ``[batch, length]`` (None: all ones) and position_ids, which it always hands on.
    """
    if inputs.get("past_key_values") is not None or inputs.get("inputs_embeds") is not None:
        return False
    mask, positions = inputs.get("attention_mask"), inputs["position_ids"].cpu()
    seen = torch.ones_like(positions) if mask is None else (mask != 0).long().cpu()
    if not bool(seen[:, -1].all()) or bool((seen.diff(dim=1) < 0).any()):
        return False
    return torch.equal(positions * seen, (seen.cumsum(dim=1) - 1) * seen)
