"""The next token of every row, chosen on the device from its logits; see `jaxsloth.sampling` for what is meant by it.

Everything is read from buffers and written to buffers, so that a CUDA graph can hold it; numbers in the place of tensors are
arguments of kernels (masked_fill), never copies from the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jaxsloth.kernels.gumbel.contract import DRAW
from jaxsloth.kernels.registry import Target, resolve
from jaxsloth.sampling import ANY, GROUP, NO_CHOICE, NOTHING, TOO_FEW, Sampling, Variant

FLOATS = ("temperature", "dropped", "min_p", "typical_p", "epsilon", "eta", "penalty")
INTEGERS = ("top_k", "ends_from", "begun_from")
NEGATIVE = float("-inf")


class Sampler:
    """A variant's buffers for `batch` rows of at most `slots` tokens."""

    def __init__(self, variant: Variant, batch: int, slots: int, vocab: int, device: torch.device) -> None:
        self.variant, self.vocab, self.slots = variant, vocab, slots
        self._draw = resolve(DRAW, "torch", Target(device.type))  # type: ignore[arg-type]
        self._floats = torch.zeros(len(FLOATS), dtype=torch.float32, device=device)
        self._integers = torch.zeros(len(INTEGERS), dtype=torch.int64, device=device)
        self._numbers: dict[str, Any] = dict(zip(FLOATS, self._floats.unbind(), strict=True))
        self._numbers |= dict(zip(INTEGERS, self._integers.unbind(), strict=True))
        self._keys = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self._rows = torch.zeros(batch, dtype=torch.int32, device=device)
        if variant.restricts:
            self._restricted = torch.zeros(vocab, dtype=torch.uint8, device=device)
        if variant.words is not None:
            count, length = variant.words
            self._words = torch.zeros(count, length + 1, dtype=torch.int64, device=device)
        if variant.penalizes:
            self._seen = torch.zeros(batch, vocab, dtype=torch.bool, device=device)
        if variant.reach:  # as many slots in front as are looked back
            self._ids = torch.zeros(batch, variant.reach + slots + 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def begin(self, sampling: Sampling, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Before the first choice. ids: int ``[batch, used]`` as they came, of which the last lengths ``[batch]`` count; what
        stands in front of these may be `NOTHING`."""
        batch, used = ids.shape
        found = sampling.numbers(self.variant, self.vocab, batch, used)
        self._floats.copy_(torch.from_numpy(np.stack([found[name] for name in FLOATS])))
        self._integers.copy_(torch.from_numpy(np.stack([found[name] for name in INTEGERS])))
        self._keys.copy_(torch.from_numpy(found["keys"].astype(np.int64)))
        self._rows.copy_(torch.from_numpy(found["rows"]))
        if self.variant.restricts:
            self._restricted.copy_(torch.from_numpy(found["restricted"]))
        if self.variant.words is not None:
            self._words.copy_(torch.from_numpy(found["words"]))
        if self.variant.reach:
            self._ids.fill_(NOTHING)
            self._ids[:, self.variant.reach : self.variant.reach + used] = torch.from_numpy(ids).to(self._ids)
        if self.variant.penalizes:
            counts = np.arange(used) >= used - lengths[:, None]
            places = torch.from_numpy(np.where(counts, ids, self.vocab).astype(np.int64)).to(self._seen.device)
            wide = torch.zeros(batch, self.vocab + 1, dtype=torch.bool, device=self._seen.device)
            self._seen.copy_(wide.scatter_(1, places, True)[:, : self.vocab])

    @torch.no_grad()
    def choose(self, logits: torch.Tensor, slot: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what is said, a token to go on with), int64 ``[batch]``: the first may be `TOO_FEW` or `NO_CHOICE`.

        logits float32 ``[batch, vocab]``; slot int64 ``[1]`` and positions int32 ``[batch]``: of the token that is chosen.
        """
        logits = self.processed(logits, slot)
        if self.variant.kind == "greedy":
            best, said = logits.max(dim=1)
            said = said.masked_fill(best.isnan(), NO_CHOICE)
        else:
            said = self._drawn(logits, positions)
        token = said.clamp(min=0)
        self.remember(token, slot)
        return said, token

    def remember(self, token: torch.Tensor, slot: torch.Tensor) -> None:
        """token int64 ``[batch]`` is what slot int64 ``[1]`` holds."""
        if self.variant.reach:
            self._ids.index_copy_(1, slot + self.variant.reach, token[:, None])
        if self.variant.penalizes:
            self._seen.scatter_(1, token[:, None], True)

    def _drawn(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        scores, ids, few = self.scores(logits)
        place = self._draw(scores, ids, self._keys, self._rows, positions, vocab=self.vocab)
        best = scores.amax(dim=1)  # not the last: typical_p may take the likeliest away
        said = place if ids is None else ids.gather(1, place[:, None])[:, 0]
        if few is not None:
            said = said.masked_fill(few, TOO_FEW)
        return said.masked_fill(~best.isfinite(), NO_CHOICE)

    def processed(self, logits: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """What comes before temperature."""
        numbers = self._numbers
        if self.variant.penalizes:
            penalty = numbers["penalty"]
            logits = torch.where(self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        for banned in self._ended_by(slot):
            wide = torch.zeros(logits.shape[0], self.vocab + 1, dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(wide.scatter_(1, banned, True)[:, : self.vocab], NEGATIVE)
        if self.variant.restricts:
            bits = 1 + 2 * (slot < numbers["ends_from"]) + 4 * (slot < numbers["begun_from"])
            logits = logits.masked_fill((self._restricted & bits.to(torch.uint8)) != 0, NEGATIVE)
        return logits

    def _ended_by(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """Tokens that would end a sequence that may not come, int64 ``[batch, any]``; the vocabulary's size where there is
        none."""
        found, reach, n = [], self.variant.reach, self.variant.ngram
        if n:
            windows = self._ids.unfold(1, n, 1)  # a view
            back = torch.arange(1 - n, 0, device=slot.device)
            matches = (windows[..., :-1] == self._ids[:, slot + reach + back][:, None]).all(dim=-1)
            matches &= torch.arange(windows.shape[1], device=slot.device) <= slot + reach - n
            last = windows[..., -1]
            found.append(last.masked_fill(~matches | (last < 0), self.vocab))
        if self.variant.words is not None:
            length = self.variant.words[1]
            tail = self._ids[:, slot + reach + torch.arange(-length, 0, device=slot.device)]
            fronts, ends = self._words[:, :-1], self._words[:, -1]
            matches = ((fronts == tail[:, None]) | (fronts == ANY)).all(dim=-1)
            found.append(ends.expand_as(matches).masked_fill(~matches, self.vocab))
        return found

    def scores(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(scores ``[batch, n]``, -inf where a token is taken away; the tokens, alike, in ascending order of their scores, None
        for all as they are; rows whose candidates are too few)."""
        numbers, kind = self._numbers, self.variant.kind
        if kind == "plain":
            scores, ids, few = logits / numbers["temperature"], None, None
            scores = scores.masked_fill(scores - scores.amax(dim=1, keepdim=True) < numbers["min_p"], NEGATIVE)
            return self._rare(scores) if self.variant.rare else scores, ids, few
        rest = None
        if kind == "ordered":
            divided, ids = (logits / numbers["temperature"]).sort(dim=1, stable=True)
        else:
            values, ids = candidates(logits, self.variant.candidates)
            divided = values / numbers["temperature"]
            if kind == "nucleus":
                whole = (logits / numbers["temperature"] - divided[:, -1:]).exp().sum(dim=1, keepdim=True)
                rest = 1.0 - (divided - divided[:, -1:]).exp().sum(dim=1, keepdim=True) / whole
        scores = divided
        if kind != "nucleus":
            bar = scores.gather(1, (scores.shape[1] - numbers["top_k"]).clamp(min=0).expand(scores.shape[0], 1))
            scores = scores.masked_fill(scores < bar, NEGATIVE)
        ranked, scores = scores, self._top_p(scores, rest)
        few = None
        if self.variant.candidates:  # what equals the last of them may lie outside too, and belongs to those that stay
            stay = scores if kind == "nucleus" else ranked
            few = ((stay > NEGATIVE) & (divided == divided[:, :1])).any(dim=1)
        scores = scores.masked_fill(scores - scores[:, -1:] < numbers["min_p"], NEGATIVE)
        return self._rare(scores) if self.variant.rare else scores, ids, few

    def _top_p(self, scores: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        """rest: the probability of all that are not among the scores, None for none."""
        dropped = self._numbers["dropped"]
        probabilities = scores.softmax(dim=1)
        if rest is not None:
            rest = rest.clamp(min=0.0)
            probabilities = probabilities * (1.0 - rest)
        reached = probabilities.cumsum(dim=1)
        removed = ((reached if rest is None else reached + rest) <= dropped) & (dropped > 0)
        removed[:, -1].fill_(False)
        return scores.masked_fill(removed, NEGATIVE)

    def _rare(self, scores: torch.Tensor) -> torch.Tensor:
        """typical_p, epsilon_cutoff and eta_cutoff."""
        numbers = self._numbers
        if self.variant.kind != "plain":
            logs = scores.log_softmax(dim=1)
            probabilities = logs.exp()
            surprise = (-logs + (logs * probabilities).nansum(dim=1, keepdim=True)).abs()
            ordered, order = surprise.sort(dim=1)
            reached = probabilities.gather(1, order).cumsum(dim=1)
            last = (reached < numbers["typical_p"]).sum(dim=1, keepdim=True).clamp(max=scores.shape[1] - 1)
            removed = (surprise > ordered.gather(1, last)) & (numbers["typical_p"] < 1)
            scores = scores.masked_fill(removed, NEGATIVE)
        for name in ("epsilon", "eta"):
            bar, logs = numbers[name], scores.log_softmax(dim=1)
            probabilities = logs.exp()
            if name == "eta":
                entropy = -(logs * probabilities).nansum(dim=1, keepdim=True)
                bar = torch.minimum(bar, bar.sqrt() * torch.exp(-entropy))
            removed = (probabilities < bar) & (scores < scores.amax(dim=1, keepdim=True))
            scores = scores.masked_fill(removed, NEGATIVE)
        return scores


def candidates(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the `count` largest of each row of ``[batch, vocab]``, ascending; their places), equals by their places.

    They lie in the `count` groups of neighbours whose own largest are the largest, so no more than those are looked at.
    """
    batch, vocab = logits.shape
    groups, places = -(-vocab // GROUP), None
    if groups > count:
        whole = torch.nn.functional.pad(logits, (0, groups * GROUP - vocab), value=NEGATIVE) if vocab % GROUP else logits
        largest = whole.view(batch, groups, GROUP).amax(dim=2).topk(count, dim=1, sorted=False).indices
        places = (largest[..., None] * GROUP + torch.arange(GROUP, device=logits.device)).view(batch, count * GROUP)
        logits = whole.gather(1, places)
    values, ids = logits.topk(count, dim=1, sorted=False)
    ids, order = (ids if places is None else places.gather(1, ids)).sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, stable=True)
    return values, ids.gather(1, order)
