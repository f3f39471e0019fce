"""The next token of every row, chosen on the device from its logits; see `jaxsloth.sampling` for what is meant by it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsloth.kernels.gumbel.xla_ops import draw
from jaxsloth.sampling import ANY, GROUP, NO_CHOICE, NOTHING, TOO_FEW, Sampling, Variant

NEGATIVE = -jnp.inf


def begin(sampling: Sampling, variant: Variant, vocab: int, ids: np.ndarray, used: int, lengths: np.ndarray) -> tuple[Any, Any]:
    """(numbers, what is kept of the tokens) for `choose`. ids int ``[batch, slots]``, of which `used` are written, the last
    lengths ``[batch]`` of them by tokens that count."""
    kept, reach = {}, variant.reach
    if reach:  # as many slots in front as are looked back
        kept["ids"] = np.pad(ids, ((0, 0), (reach, 1)), constant_values=NOTHING)
    if variant.penalizes:
        kept["seen"] = np.zeros((len(ids), vocab), bool)
        for row, length in enumerate(lengths):
            kept["seen"][row, ids[row, used - length : used]] = True
    return jax.device_put((sampling.numbers(variant, vocab, len(ids), used), kept))


@partial(jax.jit, static_argnames=("variant",))
def first(logits: Any, numbers: Any, kept: Any, slot: Any, positions: Any, variant: Variant) -> tuple[Any, Any, Any]:
    """`choose`, as a program of its own."""
    return choose(logits, numbers, kept, slot, positions, variant)


def choose(logits: Any, numbers: Any, kept: Any, slot: Any, positions: Any, variant: Variant) -> tuple[Any, Any, Any]:
    """(what is said, a token to go on with, what is kept then), tokens int32 ``[batch]``: the first may be `TOO_FEW` or
    `NO_CHOICE`.

    logits float32 ``[batch, vocab]``; slot int32 and positions int32 ``[batch]``: of the token that is chosen.
    """
    logits = processed(logits, numbers, kept, slot, variant)
    if variant.kind == "greedy":
        said = jnp.argmax(logits, axis=1).astype(jnp.int32)
        said = jnp.where(jnp.isnan(jnp.max(logits, axis=1)), NO_CHOICE, said)
    else:
        scored, ids, few = scores(logits, numbers, variant)
        said = draw(scored, ids, numbers["keys"], numbers["rows"], positions, vocab=logits.shape[1]).astype(jnp.int32)
        best = jnp.max(scored, axis=1)  # not the last: typical_p may take the likeliest away
        said = said if ids is None else jnp.take_along_axis(ids, said[:, None], axis=1)[:, 0]
        said = said if few is None else jnp.where(few, TOO_FEW, said)
        said = jnp.where(jnp.isfinite(best), said, NO_CHOICE)
    token = jnp.maximum(said, 0)
    return said, token, remembered(kept, token, slot, variant)


def remembered(kept: Any, token: Any, slot: Any, variant: Variant) -> Any:
    """What is kept once token int32 ``[batch]`` is what the slot holds."""
    if variant.reach:
        ids = jax.lax.dynamic_update_slice_in_dim(kept["ids"], token[:, None], slot + variant.reach, axis=1)
        kept = kept | {"ids": ids}
    if variant.penalizes:
        kept = kept | {"seen": kept["seen"].at[jnp.arange(len(token)), token].set(True)}
    return kept


def processed(logits: Any, numbers: Any, kept: Any, slot: Any, variant: Variant) -> Any:
    """What comes before temperature."""
    batch, vocab = logits.shape
    if variant.penalizes:
        penalty = numbers["penalty"]
        logits = jnp.where(kept["seen"], jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    for banned in _ended_by(numbers, kept, slot, variant, vocab):
        rows = jnp.arange(batch)[:, None]
        logits = jnp.where(jnp.zeros((batch, vocab), bool).at[rows, banned].set(True, mode="drop"), NEGATIVE, logits)
    if variant.restricts:
        bits = 1 + 2 * (slot < numbers["ends_from"]) + 4 * (slot < numbers["begun_from"])
        logits = jnp.where((numbers["restricted"] & bits.astype(jnp.uint8)) != 0, NEGATIVE, logits)
    return logits


def _ended_by(numbers: Any, kept: Any, slot: Any, variant: Variant, vocab: int) -> list[Any]:
    """Tokens that would end a sequence that may not come, int32 ``[batch, any]``; the vocabulary's size where there is none."""
    found, reach, n = [], variant.reach, variant.ngram
    if n:
        ids = kept["ids"]
        count = ids.shape[1] - n + 1
        matches = jnp.broadcast_to(jnp.arange(count) <= slot + reach - n, (ids.shape[0], count))
        for place in range(n - 1):
            own = jax.lax.dynamic_slice_in_dim(ids, slot + reach + 1 - n + place, 1, axis=1)
            matches &= ids[:, place : place + count] == own
        last = ids[:, n - 1 :]
        found.append(jnp.where(matches & (last >= 0), last, vocab))
    if variant.words is not None:
        length = variant.words[1]
        tail = jax.lax.dynamic_slice_in_dim(kept["ids"], slot + reach - length, length, axis=1)
        fronts, ends = numbers["words"][:, :-1], numbers["words"][:, -1]
        matches = ((fronts == tail[:, None]) | (fronts == ANY)).all(axis=-1)
        found.append(jnp.where(matches, ends, vocab))
    return found


def scores(logits: Any, numbers: Any, variant: Variant) -> tuple[Any, Any, Any]:
    """(scores ``[batch, n]``, -inf where a token is taken away; the tokens, alike, in ascending order of their scores, None
    for all as they are; rows whose candidates are too few)."""
    if variant.kind == "plain":
        scored = logits / numbers["temperature"]
        scored = jnp.where(scored - scored.max(axis=1, keepdims=True) < numbers["min_p"], NEGATIVE, scored)
        return _rare(scored, numbers, variant) if variant.rare else scored, None, None
    rest = None
    if variant.kind == "ordered":
        places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        divided, ids = jax.lax.sort((logits / numbers["temperature"], places), num_keys=1, is_stable=True)
    else:
        values, ids = candidates(logits, variant.candidates)
        divided = values / numbers["temperature"]
        if variant.kind == "nucleus":
            whole = jnp.exp(logits / numbers["temperature"] - divided[:, -1:]).sum(axis=1, keepdims=True)
            rest = 1.0 - jnp.exp(divided - divided[:, -1:]).sum(axis=1, keepdims=True) / whole
    scored = divided
    if variant.kind != "nucleus":
        bar = scored[:, jnp.maximum(scored.shape[1] - numbers["top_k"], 0)][:, None]
        scored = jnp.where(scored < bar, NEGATIVE, scored)
    ranked, scored = scored, _top_p(scored, rest, numbers["dropped"])
    few = None
    if variant.candidates:  # what equals the last of them may lie outside too, and belongs to those that stay
        stay = scored if variant.kind == "nucleus" else ranked
        few = ((stay > NEGATIVE) & (divided == divided[:, :1])).any(axis=1)
    scored = jnp.where(scored - scored[:, -1:] < numbers["min_p"], NEGATIVE, scored)
    return _rare(scored, numbers, variant) if variant.rare else scored, ids, few


def _top_p(scored: Any, rest: Any, dropped: Any) -> Any:
    """rest: the probability of all that are not among the scores, None for none."""
    probabilities = jax.nn.softmax(scored, axis=1)
    if rest is not None:
        rest = jnp.maximum(rest, 0.0)
        probabilities = probabilities * (1.0 - rest)
    reached = jnp.cumsum(probabilities, axis=1)
    removed = ((reached if rest is None else reached + rest) <= dropped) & (dropped > 0)
    return jnp.where(removed.at[:, -1].set(False), NEGATIVE, scored)


def _rare(scored: Any, numbers: Any, variant: Variant) -> Any:
    """typical_p, epsilon_cutoff and eta_cutoff."""
    if variant.kind != "plain":
        logs = jax.nn.log_softmax(scored, axis=1)
        probabilities = jnp.exp(logs)
        surprise = jnp.abs(-logs + jnp.nansum(logs * probabilities, axis=1, keepdims=True))
        ordered, own = jax.lax.sort((surprise, probabilities), num_keys=1)
        last = jnp.minimum((jnp.cumsum(own, axis=1) < numbers["typical_p"]).sum(axis=1, keepdims=True), scored.shape[1] - 1)
        removed = (surprise > jnp.take_along_axis(ordered, last, axis=1)) & (numbers["typical_p"] < 1)
        scored = jnp.where(removed, NEGATIVE, scored)
    for name in ("epsilon", "eta"):
        bar, logs = numbers[name], jax.nn.log_softmax(scored, axis=1)
        probabilities = jnp.exp(logs)
        if name == "eta":
            entropy = -jnp.nansum(logs * probabilities, axis=1, keepdims=True)
            bar = jnp.minimum(bar, jnp.sqrt(bar) * jnp.exp(-entropy))
        removed = (probabilities < bar) & (scored < scored.max(axis=1, keepdims=True))
        scored = jnp.where(removed, NEGATIVE, scored)
    return scored


def candidates(logits: Any, count: int) -> tuple[Any, Any]:
    """(the `count` largest of each row of ``[batch, vocab]``, ascending; their places), equals by their places.

    They lie in the `count` groups of neighbours whose own largest are the largest, so no more than those are looked at.
    """
    batch, vocab = logits.shape
    groups, places = -(-vocab // GROUP), jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    if groups > count:
        whole = jnp.pad(logits, ((0, 0), (0, groups * GROUP - vocab)), constant_values=NEGATIVE)
        whole = whole.reshape(batch, groups, GROUP)
        largest = jax.lax.top_k(whole.max(axis=2), count)[1]
        logits = jnp.take_along_axis(whole, largest[..., None], axis=1).reshape(batch, -1)
        places = (largest[..., None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)).reshape(batch, -1)
    values, ids = jax.lax.sort((logits, places), num_keys=2)
    return values[:, -count:], ids[:, -count:]
