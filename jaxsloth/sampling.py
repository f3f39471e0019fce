"""How the next token is chosen: settings, and what the backends' decoding programs are told of them.

A program is recorded, or compiled, for a `Variant`: which kinds of processors there are. Their numbers are arrays on the device
(`numbers`), so that another temperature needs no other program. The processors act in transformers' order: repetition penalty,
n-grams that may not repeat, tokens and sequences that may not come, then temperature, top_k, top_p, min_p, typical_p,
epsilon_cutoff, eta_cutoff. All of it is float32; then one token is drawn of those that are left (kernels/gumbel).

Filters by rank need the tokens in order. `CANDIDATES` of the likeliest are enough for a top_k below that, and for a top_p as
long as its set is not larger, which the program checks: a token is `TOO_FEW` where some that are not among the candidates might
belong to the set as well (as many equals of the last one count), and the choice is then made again among all.

Equals: top_k keeps all that equal the k-th value; of the equals at the border of top_p those with the highest ids stay, as
after a stable sort (transformers' own is not: which of them stay is as it happens). Sums of probabilities are added in another
order on each backend, so a token whose cumulative probability is within rounding (about 1e-6) of a bound may be kept by one of
them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CANDIDATES = 256  # the likeliest tokens that are put in order where that may be enough
GROUP = 32  # neighbouring tokens whose largest is found first
TOO_FEW, NO_CHOICE = -1, -2  # in the place of a token: see above; and logits that are NaN, or all of them -inf
ANY, NEVER, NOTHING = -1, -2, -3  # in sequences that may not come: any token, none; and a slot that no token is in

Kind = Literal["greedy", "plain", "top_k", "nucleus", "ordered"]


@dataclass(frozen=True)
class Variant:
    """What a program is made for.

    kind: the likeliest token; drawn without any order; from the candidates after top_k, or after top_p; or from all in order.
    candidates: how many, 0 for all. rare: typical_p, epsilon_cutoff or eta_cutoff. ngram: no_repeat_ngram_size. restricts:
    some tokens may not come, always or at first. words: (how many, how long at most without the last token) sequences may not
    come, both rounded up.
    """

    kind: Kind = "greedy"
    candidates: int = 0
    rare: bool = False
    penalizes: bool = False
    ngram: int = 0
    restricts: bool = False
    words: tuple[int, int] | None = None

    @property
    def reach(self) -> int:
        """How many of the last tokens are compared with sequences; 0: what was said before does not count, token by token."""
        return max(self.ngram, self.words[1] if self.words is not None else 0)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which token follows. Without do_sample the likeliest is taken, the lowest id among equals, after the processors.

    repetition_penalty: Keskar et al. 2019, arXiv:1909.05858. no_repeat_ngram_size: no sequence of so many tokens comes twice; 0
    is none. min_new_tokens: no end (eos_ids) before. suppress_tokens never come, begin_suppress_tokens not as the first;
    bad_words_ids are sequences. The rest needs do_sample: top_p (Holtzman et al. 2020, arXiv:1904.09751), min_p (Nguyen et al.
    2024, arXiv:2407.01082), typical_p (Meister et al. 2023, arXiv:2202.00666), epsilon_cutoff and eta_cutoff (Hewitt et al.
    2022, arXiv:2210.15191). None is off. seed: of 64 bits; a draw is of (seed, row, position), or of a row's own seed and its
    position where there is one a row.

    Raises:
        ValueError: a value that can't be; those that only sampling reads are looked at where it samples.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    eos_ids: tuple[int, ...] | None = None
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        checks = [
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            ("bad_words_ids", all(len(word) for word in self.bad_words_ids), "sequences of at least one token each"),
        ]
        if self.do_sample:
            checks += [
                ("temperature", self.temperature > 0, "positive (do_sample=False takes the likeliest token)"),
                ("top_k", self.top_k is None or self.top_k > 0, "positive"),
                ("top_p", self.top_p is None or 0 <= self.top_p <= 1, "in [0, 1]"),
                ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
                ("typical_p", self.typical_p is None or 0 < self.typical_p <= 1, "in (0, 1]"),
                ("epsilon_cutoff", self.epsilon_cutoff is None or 0 <= self.epsilon_cutoff < 1, "in [0, 1)"),
                ("eta_cutoff", self.eta_cutoff is None or 0 <= self.eta_cutoff < 1, "in [0, 1)"),
            ]
        for name, holds, must in checks:
            if not holds:
                raise ValueError(f"{name} must be {must}, got {getattr(self, name)!r}")

    def variant(self, vocab: int, everything: bool = False) -> Variant:
        """The program for it. everything: among all tokens, where the candidates have been too few."""
        kind, candidates = self._kind(vocab)
        if everything and candidates:
            kind, candidates = "ordered", 0
        words = [len(word) - 1 for word in self.bad_words_ids if len(word) > 1]
        return Variant(
            kind=kind,
            candidates=candidates,
            rare=self.do_sample and (self._typical() or bool(self.epsilon_cutoff) or bool(self.eta_cutoff)),
            penalizes=self.repetition_penalty != 1.0,
            ngram=self.no_repeat_ngram_size,
            restricts=bool(self.restricted()),
            words=(_rounded_up(len(words), 16), _rounded_up(max(words), 4)) if words else None,
        )

    def _kind(self, vocab: int) -> tuple[Kind, int]:
        if not self.do_sample:
            return "greedy", 0
        few = 0 if vocab <= CANDIDATES else CANDIDATES
        nucleus = self.top_p is not None and self.top_p < 1.0
        if self.top_k is not None and self.top_k < vocab:
            return ("top_k", few) if few and self.top_k < few else ("ordered", 0)
        if nucleus:
            return ("nucleus", few) if few else ("ordered", 0)
        return ("ordered", 0) if self._typical() else ("plain", 0)

    def _typical(self) -> bool:
        return self.typical_p is not None and self.typical_p < 1.0

    def restricted(self) -> dict[int, int]:
        """Which tokens may not come: 1 never, 2 before min_new_tokens, 4 as the first; sums of them."""
        found: dict[int, int] = {}
        ends = [end for end in self.eos_ids or () if end >= 0]  # others end nothing
        single = [word[0] for word in self.bad_words_ids if len(word) == 1 and word[0] not in ends]
        groups = [(1, [*self.suppress_tokens, *single]), (4, self.begin_suppress_tokens)]
        groups += [(2, ends)] if self.min_new_tokens else []
        for bit, tokens in groups:
            for token in tokens:
                found[int(token)] = found.get(int(token), 0) | bit
        return found

    def check(self, vocab: int, rows: int) -> None:
        """Whether it fits a model and a batch.

        Raises:
            ValueError: a token that the model has not, or seeds of another number than the rows.
        """
        named = [("suppress_tokens", self.suppress_tokens), ("begin_suppress_tokens", self.begin_suppress_tokens)]
        for name, tokens in [*named, *(("bad_words_ids", word) for word in self.bad_words_ids)]:
            wrong = [token for token in tokens if not 0 <= token < vocab]
            if wrong:
                raise ValueError(f"{name} must be token ids of the model, from 0 to {vocab - 1}, got {wrong[0]}")
        if isinstance(self.seed, Sequence) and len(self.seed) != rows:
            raise ValueError(f"seed must be one number or one a row: {rows} rows, got {len(self.seed)} seeds")

    def numbers(self, variant: Variant, vocab: int, rows: int, slot: int) -> dict[str, np.ndarray]:
        """What a program of `variant` reads, by name: float32 and int32 scalars, neutral where a setting is off, and arrays.

        slot: the cache's next slot, of the first token to be chosen. dropped: the most that top_p may take away; min_p: its
        logarithm. keys: uint32 ``[rows, 2]``; restricted: uint8 ``[vocab]``; words: int32 ``[count, length + 1]``, `ANY` in
        front of those that are shorter, `NEVER` in unused ones.
        """
        floats = {
            "temperature": self.temperature,
            "dropped": 0.0 if self.top_p is None else 1 - self.top_p,
            "min_p": np.log(self.min_p) if self.min_p else -np.inf,
            "typical_p": 1.0 if self.typical_p is None else self.typical_p,
            "epsilon": self.epsilon_cutoff or 0.0,
            "eta": self.eta_cutoff or 0.0,
            "penalty": self.repetition_penalty,
        }
        found: dict[str, np.ndarray] = {name: np.asarray(value, np.float32) for name, value in floats.items()}
        whole = {"top_k": min(self.top_k or vocab, vocab), "ends_from": slot + self.min_new_tokens, "begun_from": slot + 1}
        found |= {name: np.asarray(value, np.int32) for name, value in whole.items()}
        found |= self._draws(rows)
        if variant.restricts:
            restricted = np.zeros(vocab, np.uint8)
            for token, bits in self.restricted().items():
                restricted[token] = bits
            found["restricted"] = restricted
        if variant.words is not None:
            found["words"] = _padded(self.bad_words_ids, *variant.words)
        return found

    def _draws(self, rows: int) -> dict[str, np.ndarray]:
        own = isinstance(self.seed, Sequence)
        seeds = list(self.seed) if isinstance(self.seed, Sequence) else [self.seed] * rows
        keys = [(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF) for seed in seeds]
        numbers = np.zeros(rows, np.int32) if own else np.arange(rows, dtype=np.int32)
        return {"keys": np.array(keys, np.uint32).reshape(rows, 2), "rows": numbers}


def _rounded_up(count: int, least: int) -> int:
    """To a power of two: few shapes for many requests."""
    return max(least, 1 << (count - 1).bit_length())


def _padded(words: Sequence[Sequence[int]], count: int, length: int) -> np.ndarray:
    found = np.full((count, length + 1), ANY, np.int32)
    several = [word for word in words if len(word) > 1]
    found[len(several) :] = NEVER
    for place, word in zip(found, several, strict=False):
        place[-len(word) :] = word
    return found


GREEDY = Sampling()
