"""Text generation over a backend's KV cache: the loop over answers, the same for both backends.

Tokens are chosen on the device (`jaxsloth.sampling`), by random numbers of (seed, row, position), so that neither the backend
nor the other rows of a batch change what a row says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxsloth.backend import DecodeState, Model
from jaxsloth.batch import check_ids, check_length
from jaxsloth.foreign import check_text
from jaxsloth.sampling import NO_CHOICE, NOTHING, Sampling

# What tokenizers put in place of bytes that are no whole UTF-8 character yet.
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Sampling):
    """How to generate: `Sampling`, and when to stop.

    stop: strings that end a row; they and what follows are cut off. eos_ids: None takes the model's.

    Raises:
        ValueError: a value that can't be; those that only sampling reads are looked at where it samples.
    """

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens <= 0:
            raise ValueError(f"max_new_tokens must be positive, got {self.max_new_tokens!r}")
        if any(not text for text in self.stop):
            raise ValueError("stop must hold strings that are not empty")


def tokens_of(state: DecodeState, sampling: Sampling, count: int, running: np.ndarray) -> Iterator[np.ndarray]:
    """A token a row at a time, int32 ``[batch]``, `count` times. running: bool ``[batch]``, kept by the caller: rows whose
    tokens are looked at.

    Raises:
        ValueError: a running row has no token to choose.
    """
    done = 0
    for burst in state.choose(sampling, count):
        for tokens in burst.T:
            lost = np.flatnonzero(running & (tokens == NO_CHOICE))
            if lost.size:
                raise ValueError(
                    f"row {lost[0]} has no token to choose after {done} new ones: its logits are NaN, or every token is "
                    "suppressed; look for values in the weights or adapters that are not finite, and at generate's settings"
                )
            yield tokens
            done += 1


# Fields of a generation_config.json that count for every answer, and those that count where it samples.
_ALWAYS = (
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)
_SAMPLED = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def answering(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`GenerationSettings` of a call: what is given, over what a generation_config.json says of repetition and suppressed
    tokens and, unless the call is greedy, of sampling. What it leaves out is transformers' (of top_k: 50); a top_k of 0 takes
    all tokens."""
    found = {name: defaults[name] for name in _ALWAYS if defaults.get(name) is not None}
    if given.get("do_sample", defaults.get("do_sample")):
        own = {name: defaults[name] for name in _SAMPLED if defaults.get(name) is not None}
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
        TypeError: a prompt is no row of ids.
        ValueError: no prompts, an empty one, or a tokenizer is needed and missing.
    """
    for place, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
            got = f"got {type(prompt).__name__}; give all texts, or all rows (one: [[…]])"
            raise TypeError(f"prompt {place} must be a row of token ids, {got}")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate needs prompts of at least one token each")
    if tokenizer is None and (settings.stop or on_text is not None):
        raise ValueError("stop strings and streaming need the tokenizer; pass tokenizer=")
    ends = model.spec.eos_ids if settings.eos_ids is None else settings.eos_ids
    settings = replace(settings, eos_ids=check_ends(ends, model.spec.embedding.vocab))
    rows = [_Row(list(prompt)) for prompt in prompts]
    lengths = np.array([len(row.prompt) for row in rows], np.int32)
    padded = np.full((len(rows), int(lengths.max())), NOTHING, np.int32)
    for place, row in enumerate(rows):
        ids = np.asarray(row.prompt)
        padded[place, -len(ids) :] = check_ids(ids, model.spec.embedding.vocab, f"prompt {place}")
    check_length(padded.shape[1] + settings.max_new_tokens, model.spec.max_positions)
    state, running = model.start_decode(padded, lengths, padded.shape[1] + settings.max_new_tokens), np.ones(len(rows), bool)
    for tokens in tokens_of(state, settings, settings.max_new_tokens, running):
        for place, row in enumerate(rows):
            if not row.done:
                _take(row, int(tokens[place]), settings, tokenizer)
                if on_text is not None:
                    _send(row, place, settings, tokenizer, on_text)
        running[:] = [not row.done for row in rows]
        if not running.any():
            break
    for place, row in enumerate(rows):
        row.done = True
        if on_text is not None:
            _send(row, place, settings, tokenizer, on_text)
    return [row.tokens for row in rows]


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


def _take(row: _Row, token: int, settings: GenerationSettings, tokenizer: Any) -> None:
    """Appends a token, unless it ends the row; a stop string in the text ends the row and is cut off."""
    if token in (settings.eos_ids or ()):
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
