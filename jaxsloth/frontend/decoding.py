"""transformers' `generate` over a backend's KV cache: its arguments, its tokens and its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteriaList
from transformers.generation import GenerationMode

from jaxsloth.backend import Model
from jaxsloth.batch import check_ids, check_length
from jaxsloth.frontend.arguments import refuse_unknown
from jaxsloth.frontend.module.cached_rows import follows_on
from jaxsloth.generation import GenerationSettings, choose

# Fields of a GenerationConfig that the cached decoder reads, and those that only say where it came from or how it caches.
_READ = {
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "use_cache"),
    *("cache_implementation", "transformers_version", "_from_model_config", "return_legacy_cache"),
}
_TENSORS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "past_key_values",
    "inputs_embeds",
    "cache_position",
}
_ARGUMENTS = {
    *("inputs", "generation_config", "streamer", "stopping_criteria", "logits_processor", "synced_gpus", "assistant_model"),
    *("prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "tokenizer"),
}


# transformers' loops that go on by one token a row and ask nothing of a cache but its rows in another order.
_LOOPS = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}


@dataclass(frozen=True)
class Prepared:
    """A call that the cached decoder can answer. ids, mask: int64 ``[batch, length]``, padded on the left."""

    ids: torch.Tensor
    mask: np.ndarray
    settings: GenerationSettings
    eos: tuple[int, ...]
    pad: int
    stops: StoppingCriteriaList
    streamer: Any


def prepare(model: Any, inputs: Any, generation_config: Any, given: Mapping[str, Any]) -> Prepared | None:
    """What `decode` needs, by transformers' own rules of which setting counts; None where transformers must do it.

    Raises:
        TypeError: an argument that neither knows, with the nearest that they know.
    """
    rest = dict(given)
    streamer, stops = rest.pop("streamer", None), rest.pop("stopping_criteria", None)
    if any(rest.get(name) is not None for name in _ARGUMENTS):
        return None
    rest = {name: value for name, value in rest.items() if name not in _ARGUMENTS}
    config, tensors = model._prepare_generation_config(generation_config, **rest)
    known = {*_TENSORS, *_ARGUMENTS, *config.to_dict()}
    refuse_unknown("generate", known, {name: value for name, value in tensors.items() if name not in known})
    ids = tensors.pop("input_ids", inputs)
    mask = tensors.pop("attention_mask", None)
    tensors.pop("token_type_ids", None)
    if ids is None or ids.ndim != 2 or any(value is not None for value in tensors.values()):
        return None
    defaults = {**type(config)().to_dict(), **model.generation_config._get_default_generation_params()}
    unread = {name: value for name, value in config.to_dict().items() if name not in _READ}
    if any(value not in (None, False) and value != defaults.get(name) for name, value in unread.items()):
        return None
    return _assemble(model, ids, mask, config, stops, streamer)


def caches(config: Any, inputs: Mapping[str, Any], mode: Any) -> bool:
    """Whether transformers' own loop can run over `CachedRows`. inputs: what it hands to every pass."""
    if config.use_cache is False or mode not in _LOOPS or config.prefill_chunk_size is not None:
        return False
    if config.guidance_scale not in (None, 1):
        return False  # its processor runs a second set of rows through the model
    return follows_on(inputs)


def _assemble(model: Any, ids: torch.Tensor, mask: Any, config: Any, stops: Any, streamer: Any) -> Prepared | None:
    eos = _ids(config.eos_token_id)
    own = model.tokenizer.eos_token_id  # a chat template may have given answers another end than the checkpoint's config
    if own is not None and eos and own not in eos:
        eos = (*eos, own)
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), 0)
    seen = _mask(ids, mask, config.pad_token_id, eos)
    lengths = seen.sum(1)
    if not lengths.all() or (np.diff(seen, axis=1) < 0).any():
        return None  # padded on the right, or with gaps
    room = config.max_new_tokens
    if room is None:
        room = config.max_length - ids.shape[1]
    settings = GenerationSettings(
        max_new_tokens=room,
        do_sample=bool(config.do_sample),
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_k=config.top_k or None,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=1.0 if config.repetition_penalty is None else float(config.repetition_penalty),
        eos_ids=eos,
        seed=int(torch.randint(0, 2**31, ())) if config.do_sample else 0,
    )
    return Prepared(ids, seen, settings, eos, int(pad), StoppingCriteriaList(stops or []), streamer)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(token) for token in np.atleast_1d(np.asarray(value)))


def _mask(ids: torch.Tensor, mask: Any, pad: Any, eos: tuple[int, ...]) -> np.ndarray:
    """Which tokens are real, int64; without a mask transformers takes a pad token that no answer ends with as padding."""
    if mask is not None:
        return (mask != 0).cpu().numpy().astype(np.int64)
    if pad is None or pad in eos or not bool((ids == pad).any()):
        return np.ones(tuple(ids.shape), np.int64)
    return (ids != pad).cpu().numpy().astype(np.int64)


def decode(model: Model, call: Prepared) -> torch.Tensor:
    """int64 ``[batch, prompt + answer]`` on the prompt's device: the prompts, what was chosen (an end token with it), and
    padding behind the ends. The streamer gets the prompts first and then each token, as transformers hands them."""
    device, settings = call.ids.device, call.settings
    rows = call.ids.cpu().numpy().astype(np.int64)
    streamer: Any = call.streamer
    if streamer is not None:
        streamer.put(call.ids.cpu())
    check_length(rows.shape[1] + settings.max_new_tokens, model.spec.max_positions)
    state, logits = model.start_decode(
        check_ids(rows, model.spec.embedding.vocab), call.mask.sum(1).astype(np.int32), rows.shape[1] + settings.max_new_tokens
    )
    running, first = np.ones(len(rows), bool), (call.mask == 0).sum(1)  # padding counts as no repetition
    for position in range(settings.max_new_tokens):
        chosen = np.array(
            [
                choose(logits[row], rows[row, first[row] :], settings, row, position) if running[row] else call.pad
                for row in range(len(rows))
            ],
            np.int64,
        )
        rows = np.concatenate([rows, chosen[:, None]], axis=1)
        if streamer is not None:
            streamer.put(torch.from_numpy(chosen))
        running &= ~np.isin(chosen, call.eos)
        if call.stops:
            running &= ~call.stops(torch.from_numpy(rows).to(device), torch.from_numpy(logits).to(device)).cpu().numpy()  # type: ignore[arg-type]
        if not running.any() or position + 1 == settings.max_new_tokens:
            break
        logits = state.step(chosen.astype(np.int32))
    if streamer is not None:
        streamer.end()
    return torch.from_numpy(rows).to(device)
