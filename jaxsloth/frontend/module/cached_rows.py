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
            self._state = self._model.start_decode(tokens, lengths, self._capacity)
            logits = self._state.logits()
        elif count == 1:
            logits = self._state.step(tokens[:, 0])
        else:
            raise ValueError(f"rows go on by one token at a time, got {count}; generate with use_cache=False")
        self._length += count
        return torch.tensor(logits, device=input_ids.device)[:, None]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on from what row beam_idx[i] was."""
        assert self._state is not None
        self._state.reorder(beam_idx.cpu().numpy())


Whole = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class WholeRows:
    """A `transformers.Cache` that keeps tokens alone, as they were seen: every pass runs the rows whole, so that several tokens
    can be tried at once and taken back, as assisted generation does, and that loops of one's own go on as over transformers'.
    """

    is_compileable = False

    def __init__(self) -> None:
        self._ids = self._mask = self._positions = torch.empty(0, 0, dtype=torch.long)
        self._given: Whole | None = None  # the first tokens as they came, until more come: most passes are the only one

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._ids.shape[1] if self._given is None else self._given[0].shape[1]

    def append(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> Whole:
        """Tokens behind those that are kept; (input_ids, attention_mask, position_ids) of the whole rows. position_ids: the new
        tokens', by default those that follow; attention_mask: the whole rows', which begins as it began before.

        Raises:
            ValueError: other rows, or another mask of what is kept.
        """
        if not self.get_seq_length():
            given = (input_ids, attention_mask, position_ids)
            self._given = tuple(own.clone() if isinstance(own, torch.Tensor) else own for own in given)  # type: ignore[assignment]
            return given
        self._settle()
        before, (batch, count) = self._ids.shape[1], input_ids.shape
        if batch != len(self._ids):
            raise ValueError(f"past_key_values hold {len(self._ids)} rows, and input_ids have {batch}")
        shape = (batch, before + count)
        mask = torch.ones(shape, dtype=torch.long) if attention_mask is None else (attention_mask != 0).long().cpu()
        if mask.shape != shape:
            raise ValueError(
                f"attention_mask must be {shape}, the {before} tokens of past_key_values and those of input_ids, not "
                f"{tuple(mask.shape)}"
            )
        if not torch.equal(mask[:, :before], self._mask):
            raise ValueError("attention_mask must begin with the mask that past_key_values were made with, and it differs")
        positions = torch.arange(before, before + count)[None] if position_ids is None else position_ids.cpu()
        self._mask = mask
        self._ids = torch.cat([self._ids.to(input_ids.device), input_ids], dim=1)
        self._positions = torch.cat([self._positions, positions.expand(batch, count)], dim=1)
        return self._ids, self._mask, self._positions

    def _settle(self) -> None:
        if self._given is None:
            return
        (ids, mask, positions), self._given = self._given, None
        shape = tuple(ids.shape)
        self._ids = ids
        self._mask = torch.ones(shape, dtype=torch.long) if mask is None else (mask != 0).long().cpu()
        self._positions = (torch.arange(shape[1])[None] if positions is None else positions.cpu()).expand(shape)

    def activate_past_recording(self) -> None:
        """Tokens are kept in any case."""

    def crop(self, tokens: int) -> None:
        """Takes the last -tokens back; a positive number is how many stay."""
        if tokens:
            self._each(lambda kept: kept[:, :tokens])

    def reset(self) -> None:
        self.__init__()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on from what row beam_idx[i] was."""
        self._each(lambda kept: kept[beam_idx.to(kept.device)])

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda kept: kept.repeat_interleave(repeats, dim=0))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._settle()
        self._ids, self._mask, self._positions = (change(kept) for kept in (self._ids, self._mask, self._positions))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"past_key_values of a model of jaxsloth hold tokens, and no {name}: keys and values are its backend's"
        )


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
