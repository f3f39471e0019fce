"""Text generation over a backend's KV cache: the decode loop and the sampling, the same for both backends.

Sampling runs in numpy from float32 logits. Its random numbers are Philox, keyed by the seed and counted by row and position, so
that neither the backend nor the other rows of a batch change what a row says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsloth.backend import DecodeState, Model
from jaxsloth.batch import check_ids, check_length
from jaxsloth.foreign import check_text

# What tokenizers put in place of bytes that are no whole UTF-8 character yet.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate. Without do_sample the likeliest token is taken, the lowest id among equals.

    The filters act in transformers' order: repetition_penalty (Keskar et al. 2019, arXiv:1909.05858), temperature, top_k, top_p
    (Holtzman et al. 2020, arXiv:1904.09751), min_p (Nguyen et al. 2024, arXiv:2407.01082); all but the first need do_sample.
    stop: strings that end a row; they and what follows are cut off. eos_ids: None takes the model's.

    Raises:
        ValueError: a value that can't be; those that only sampling reads are looked at where it samples.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens > 0, "positive"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "positive"),
        ]
        if self.do_sample:
            checks += [
                ("temperature", self.temperature, self.temperature > 0, "positive (do_sample=False takes the likeliest token)"),
                ("top_k", self.top_k, self.top_k is None or self.top_k > 0, "positive"),
                ("top_p", self.top_p, self.top_p is None or 0 <= self.top_p <= 1, "in [0, 1]"),
                ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ]
        for name, value, holds, must in checks:
            if not holds:
                raise ValueError(f"{name} must be {must}, got {value!r}")
        if any(not text for text in self.stop):
            raise ValueError("stop must hold strings that are not empty")

    @property
    def likeliest(self) -> bool:
        """Whether each token is the likeliest of its logits as they are: then the device chooses."""
        return not self.do_sample and self.repetition_penalty == 1.0


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits ``[vocab]`` with those of tokens already seen divided (where positive) or multiplied by the penalty."""
    changed = logits.copy()
    ids = np.unique(seen)
    changed[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return changed


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """All but the k largest (and their equals) removed: set to -inf."""
    k = min(k, logits.size)
    return np.where(logits < np.partition(logits, -k)[-k], -np.inf, logits)


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """The smallest set of likeliest tokens whose probabilities reach p, and at least one token."""
    order = np.argsort(logits, kind="stable")
    below = np.cumsum(_softmax(logits[order]))
    removed = below <= 1.0 - p
    removed[-1] = False
    changed = logits.copy()
    changed[order[removed]] = -np.inf
    return changed


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Tokens with at least p times the likeliest one's probability."""
    probabilities = _softmax(logits)
    return np.where(probabilities < p * probabilities.max(), -np.inf, logits)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def choose(logits: np.ndarray, seen: np.ndarray, settings: GenerationSettings, row: int, position: int) -> int:
    """The next token of a row from its logits float32 ``[vocab]``; seen holds the row's prompt and answer so far."""
    if settings.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if not settings.do_sample:
        return int(np.argmax(logits))
    logits = logits / np.float32(settings.temperature)
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p is not None:
        logits = keep_min_p(logits, settings.min_p)
    generator = np.random.Generator(np.random.Philox(key=settings.seed, counter=[0, 0, row, position]))
    reached = np.cumsum(_softmax(logits.astype(np.float64)))
    return int(np.searchsorted(reached, generator.random() * reached[-1], side="right"))


def answering(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`GenerationSettings` of a call: what is given, over what a generation_config.json says of repetition and, unless the call
    is greedy, of sampling. What it leaves out is transformers' (of top_k: 50); a top_k of 0 takes all tokens."""
    found = {name: defaults[name] for name in ("repetition_penalty",) if defaults.get(name) is not None}
    if given.get("do_sample", defaults.get("do_sample")):
        names = ("do_sample", "temperature", "top_k", "top_p", "min_p")
        own = {name: defaults[name] for name in names if defaults.get(name) is not None}
        found |= {"top_k": 50} | own if defaults.get("do_sample") else {}
    found |= given
    return found | {"top_k": found.get("top_k") or None}


@dataclass
class _Row:
    """One prompt being answered. sent: how many characters of the answer have been handed on. text: the answer where a stop
    string has cut it, perhaps in the middle of a token."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    sent: int = 0
    text: str | None = None

    def seen(self) -> np.ndarray:
        return np.array(self.prompt + self.tokens, np.int64)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    tokenizer: Any = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[list[int]]:
    """Answers a batch of prompts.

    Args:
        prompts: token ids, each at least one; they are padded on the left.
        tokenizer: needed for stop strings and on_text.
        on_text: called with (row, new text) as whole characters become certain; what could still become a stop string is held
            back.

    Returns:
        The new tokens of each row, without the token or string that ended it; a token that a stop string begins in is dropped
        whole, while on_text gets the text up to the very character.

    Raises:
        ValueError: no prompts, an empty one, or a tokenizer is needed and missing.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate needs prompts of at least one token each")
    if tokenizer is None and (settings.stop or on_text is not None):
        raise ValueError("stop strings and streaming need the tokenizer; pass tokenizer=")
    eos = set(check_ends(model.spec.eos_ids if settings.eos_ids is None else settings.eos_ids, model.spec.embedding.vocab))
    rows = [_Row(list(prompt)) for prompt in prompts]
    lengths = np.array([len(row.prompt) for row in rows], np.int32)
    padded = np.zeros((len(rows), int(lengths.max())), np.int32)
    for place, row in enumerate(rows):
        ids = np.asarray(row.prompt)
        padded[place, -len(ids) :] = check_ids(ids, model.spec.embedding.vocab, f"prompt {place}")
    check_length(padded.shape[1] + settings.max_new_tokens, model.spec.max_positions)
    state, logits = model.start_decode(padded, lengths, padded.shape[1] + settings.max_new_tokens)
    if not settings.likeliest:
        chosen = _chosen_here(state, logits, rows, settings)
    else:
        chosen = likeliest(state, logits, settings.max_new_tokens)
    for tokens in chosen:
        for place, row in enumerate(rows):
            if not row.done:
                _take(row, int(tokens[place]), eos, settings, tokenizer)
                if on_text is not None:
                    _send(row, place, settings, tokenizer, on_text)
        if all(row.done for row in rows):
            break
    for place, row in enumerate(rows):
        row.done = True
        if on_text is not None:
            _send(row, place, settings, tokenizer, on_text)
    return [row.tokens for row in rows]


def _chosen_here(
    state: DecodeState, logits: np.ndarray, rows: list[_Row], settings: GenerationSettings
) -> Iterator[np.ndarray]:
    """A token a row at a time, chosen on the host from its logits."""
    for position in range(settings.max_new_tokens):
        chosen = np.zeros(len(rows), np.int32)
        for place, row in enumerate(rows):
            if not row.done:
                chosen[place] = choose(logits[place], row.seen(), settings, place, position)
        yield chosen
        if position + 1 < settings.max_new_tokens:
            logits = state.step(chosen)


def likeliest(state: DecodeState, logits: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """A token a row at a time, chosen on the device."""
    chosen = logits.argmax(axis=1).astype(np.int32)
    yield chosen
    if count > 1:
        for burst in state.greedy(chosen, count - 1):
            yield from burst.T


def check_ends(ends: Iterable[Any], vocab: int) -> tuple[int, ...]:
    """Tokens that end an answer; ValueError for what the vocabulary has not, which would end none. Negative ones, by which
    scripts say that nothing ends an answer, stay."""
    found = tuple(ends)
    wrong = [end for end in found if not isinstance(end, int) or end >= vocab]
    if wrong:
        raise ValueError(f"eos_token_id must be token ids of the model, from 0 to {vocab - 1}, got {wrong[0]!r}")
    return found


def answer_texts(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    settings: GenerationSettings,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Answers texts as they are written: special tokens in them (a rendered chat template) count as such, none are added."""
    rows = [tokenizer(check_text(text), add_special_tokens=False)["input_ids"] for text in texts]
    answers = ["" for _ in rows]

    def collect(row: int, text: str) -> None:
        answers[row] += text
        if on_text is not None:
            on_text(row, text)

    generate(model, rows, settings, tokenizer=tokenizer, on_text=collect)
    return answers


def _take(row: _Row, token: int, eos: set[int], settings: GenerationSettings, tokenizer: Any) -> None:
    """Appends a token, unless it ends the row; a stop string in the text ends the row and is cut off."""
    if token in eos:
        row.done = True
        return
    row.tokens.append(token)
    if settings.stop:
        text = tokenizer.decode(row.tokens, skip_special_tokens=True)
        found = [text.index(stop) for stop in settings.stop if stop in text]
        if found:
            end = min(found)
            row.done, row.text = True, text[:end]
            while row.tokens and len(tokenizer.decode(row.tokens, skip_special_tokens=True)) > end:
                row.tokens.pop()


def _send(row: _Row, place: int, settings: GenerationSettings, tokenizer: Any, on_text: Callable[[int, str], None]) -> None:
    text = tokenizer.decode(row.tokens, skip_special_tokens=True) if row.text is None else row.text
    certain = len(text)
    if not row.done:
        certain = len(text.rstrip(_INCOMPLETE))
        certain -= max((_overlap(text[:certain], stop) for stop in settings.stop), default=0)
    if certain > row.sent:
        on_text(place, text[row.sent : certain])
        row.sent = certain


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
