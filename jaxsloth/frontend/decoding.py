"""transformers' `generate` over a backend's KV cache: its arguments, its tokens and its output."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode

from jaxsloth.backend import Model
from jaxsloth.batch import check_ids, check_length
from jaxsloth.convert.checkpoint import Checkpoint
from jaxsloth.convert.generation_config import FILE
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.frontend.arguments import refuse_unknown
from jaxsloth.frontend.module.cached_rows import follows_on
from jaxsloth.generation import GenerationSettings, check_ends, tokens_of

logger = logging.getLogger("jaxsloth.frontend")

# Fields of a GenerationConfig that the cached decoder reads; the second set where it samples.
_READ = {
    *("max_new_tokens", "max_length", "max_time", "stop_strings", "do_sample", "min_new_tokens", "min_length"),
    *("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "use_cache"),
}
_SAMPLED = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_READ_OF_SAMPLING = {*_SAMPLED, "temperature", "top_k", "num_return_sequences"}
# Fields that choose none of its tokens: how transformers caches and compiles, where the config came from, what only belongs to
# an assistant, and what is only written down beside the tokens.
_NO_EFFECT = {
    *("cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile"),
    *("return_legacy_cache", "low_memory", "continuous_batching_config", "output_scores", "output_logits"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size"),
    *("assistant_lookbehind", "target_lookbehind", "decoder_start_token_id", "encoder_no_repeat_ngram_size"),
    *("transformers_version", "_from_model_config", "_commit_hash"),
}
_OF_SAMPLING = {*_SAMPLED, "temperature", "top_k", "top_h"}
_OF_BEAMS = {"early_stopping", "length_penalty"}
# transformers answers with these beside the tokens, and no backend has them to give.
_REFUSED = {
    "output_attentions": "attention's weights are never formed whole",
    "output_hidden_states": "generation keeps the last token's logits alone; call the model for hidden states",
    "use_mtp": "no model here has a head for several tokens",
}
_TENSORS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "cache_position"}
_IGNORED = {"token_type_ids", "labels", "logits_to_keep"}  # transformers' models take them to generate, and no token changes
_ARGUMENTS = {
    *(set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}),
    *("tokenizer", "assistant_tokenizer", "trust_remote_code"),
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


def generation_config(of_config: GenerationConfig, checkpoint: Checkpoint) -> GenerationConfig:
    """What a checkpoint's generation_config.json says, over what transformers made of its config.

    Raises:
        CheckpointError: transformers refuses it.
    """
    if not checkpoint.generation:
        return of_config
    try:
        return GenerationConfig.from_dict({**of_config.to_dict(), "_from_model_config": False, **checkpoint.generation})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / FILE} can't be taken: {error}") from error


def drafts(config: Any, mode: Any) -> bool:
    """Whether several tokens are tried at once and taken back, here or by whom this model assists."""
    return bool(mode == GenerationMode.ASSISTED_GENERATION or config.is_assistant)


def with_ends(model: Any, generation_config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments, with the tokenizer's end of sequence among the ends where they are still the checkpoint's: a chat
    template may have given answers another end since. Ends that someone chose stay as they are."""
    own, ends = model.tokenizer.eos_token_id, end_ids(model.generation_config)
    chosen = "eos_token_id" in given or getattr(generation_config, "eos_token_id", None) is not None
    chosen = chosen or ends != model.checkpoint_ends
    if chosen or own is None or not ends or own in ends:
        return dict(given)
    return {**given, "eos_token_id": [*ends, own]}


def prepare(model: Any, inputs: Any, generation_config: Any, given: Mapping[str, Any]) -> Prepared | None:
    """What `decode` needs, by transformers' own rules of which setting counts; None where transformers must do it.

    Raises:
        TypeError: an argument that neither knows, with the nearest that they know.
        ValueError: a setting that no way of answering has, with the reason; or one that transformers refuses.
    """
    rest = dict(given)
    streamer, stops, tokenizer = (rest.pop(name, None) for name in ("streamer", "stopping_criteria", "tokenizer"))
    generator = rest.pop("generator", None)
    asked = [name for name in _ARGUMENTS if rest.get(name) is not None and rest.get(name) is not False]
    rest = {name: value for name, value in rest.items() if name not in _ARGUMENTS}
    config, tensors = model._prepare_generation_config(generation_config, **rest)
    check_ends(end_ids(config), model.engine.model.spec.embedding.vocab)
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"generate can't take {name}={getattr(config, name)!r}: {reason}")
    tensors = {name: value for name, value in tensors.items() if name not in _REFUSED}
    known = {*_TENSORS, *_ARGUMENTS, *_IGNORED, *(name for name in config.to_dict() if not name.startswith("_"))}
    refuse_unknown("generate", known, {name: value for name, value in tensors.items() if name not in known})
    ids = tensors.pop("input_ids", inputs)
    mask = tensors.pop("attention_mask", None)
    tensors = {name: value for name, value in tensors.items() if name not in _IGNORED}
    slow = asked + [name for name, value in tensors.items() if value is not None]
    if ids is None or ids.ndim != 2:
        return _left_to_transformers([*slow, "a prompt that is no input_ids [batch, length]"], generator)
    if not ids.shape[1]:
        raise ValueError("generate needs prompts of at least one token each, got input_ids of shape " + str(tuple(ids.shape)))
    slow += _unread(model, config)
    seen = _mask(ids, mask, config.pad_token_id, end_ids(config))
    if not slow and (not seen.sum(1).all() or (np.diff(seen, axis=1) < 0).any()):
        slow.append("padding elsewhere than on the left")
    if slow:
        return _left_to_transformers(slow, generator)
    defaults = (given.get("max_length"), getattr(generation_config, "max_length", None), model.generation_config.max_length)
    length = all(value is None for value in defaults), ids.shape[1]
    config = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=length[0],
        has_default_min_length=True,
        model_input_name="input_ids",
        input_ids_length=length[1],
        inputs_tensor=ids,
    )
    model._validate_generated_length(config, ids.shape[1], length[0])
    settings = sampling_of(config, ids.shape[1], generator)
    return _assemble(ids, seen, config, settings, _stops(model, config, stops, tokenizer), streamer)


def _left_to_transformers(reasons: list[str], generator: Any) -> None:
    """Says why, once for each reason.

    Raises:
        ValueError: a torch.Generator was given.
    """
    if generator is not None:
        raise ValueError(
            f"generate can't take generator= together with {', '.join(reasons)}: transformers' loop, which answers that, draws "
            "from torch's own generator; call torch.manual_seed instead"
        )
    for reason in reasons:
        _say_slow(reason)


@cache
def _say_slow(reason: str) -> None:
    logger.warning("generate: %s is answered by transformers' own loop, a step of the model at a time, which is slower", reason)


def _unread(model: Any, config: Any) -> list[str]:
    """Fields that are set, choose tokens, and are not read by the cached decoder."""
    read = _READ | _NO_EFFECT | (_READ_OF_SAMPLING if config.do_sample else _OF_SAMPLING)
    read |= _OF_BEAMS if config.num_beams == 1 else set()
    defaults = {**type(config)().to_dict(), **model.generation_config._get_default_generation_params()}
    unread = {name: value for name, value in config.to_dict().items() if name not in read}
    return [name for name, value in unread.items() if value not in (None, False) and value != defaults.get(name)]


def _stops(model: Any, config: Any, given: Any, tokenizer: Any) -> StoppingCriteriaList:
    found = StoppingCriteriaList()
    if config.max_time is not None:
        found.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        found.append(StopStringCriteria(stop_strings=config.stop_strings, tokenizer=tokenizer or model.tokenizer))
    found.extend(given or [])
    return found


def caches(config: Any, inputs: Mapping[str, Any], mode: Any) -> bool:
    """Whether transformers' own loop can run over `CachedRows`. inputs: what it hands to every pass."""
    if config.use_cache is False or mode not in _LOOPS or config.is_assistant:
        return False
    if config.guidance_scale not in (None, 1):
        return False  # its processor runs a second set of rows through the model
    return follows_on(inputs)


def sampling_of(config: Any, length: int, generator: torch.Generator | None = None) -> GenerationSettings:
    """A GenerationConfig's settings for prompts of `length` tokens, padding included. Where it samples, the seed is drawn from
    the generator, torch's own where None came."""
    least = max(config.min_new_tokens or 0, (config.min_length or 0) - length)
    chosen: dict[str, Any] = {"min_new_tokens": max(least, 0), "no_repeat_ngram_size": config.no_repeat_ngram_size or 0}
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        chosen[name] = getattr(config, name) or ()
    if config.do_sample:
        chosen |= {name: getattr(config, name) for name in _SAMPLED}
        chosen["temperature"] = 1.0 if config.temperature is None else float(config.temperature)
        chosen["top_k"] = config.top_k or None
        device = None if generator is None else generator.device
        chosen["seed"] = int(torch.randint(0, 2**62, (), generator=generator, device=device))
    return GenerationSettings(
        max_new_tokens=config.max_length - length,
        do_sample=bool(config.do_sample),
        repetition_penalty=1.0 if config.repetition_penalty is None else float(config.repetition_penalty),
        eos_ids=end_ids(config),
        **chosen,
    )


def _assemble(
    ids: torch.Tensor,
    seen: np.ndarray,
    config: Any,
    settings: GenerationSettings,
    stops: StoppingCriteriaList,
    streamer: Any,
) -> Prepared:
    eos, several = end_ids(config), (config.num_return_sequences or 1) if config.do_sample else 1
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), 0)
    return Prepared(
        ids.repeat_interleave(several, dim=0), np.repeat(seen, several, axis=0), settings, eos, int(pad), stops, streamer
    )


def end_ids(config: Any) -> tuple[int, ...]:
    """The tokens that end an answer by a GenerationConfig."""
    if config.eos_token_id is None:
        return ()
    return tuple(np.atleast_1d(np.asarray(config.eos_token_id)).tolist())


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
    device, settings, ends = call.ids.device, call.settings, bool(call.eos)  # without ends, stopped rows go on as the others
    batch, length = call.ids.shape
    prompts = check_ids(call.ids.cpu().numpy(), model.spec.embedding.vocab)
    rows = np.full((batch, length + settings.max_new_tokens), call.pad, np.int64)
    rows[:, :length] = prompts
    if call.streamer is not None:
        call.streamer.put(call.ids.cpu())
    check_length(rows.shape[1], model.spec.max_positions)
    state = model.start_decode(prompts, call.mask.sum(1).astype(np.int32), rows.shape[1])
    running, goes_on = np.ones(batch, bool), np.ones(batch, bool)
    for tokens in tokens_of(state, settings, settings.max_new_tokens, goes_on):
        rows[:, length] = np.where(goes_on, tokens, call.pad)  # rows that have ended go on there, and nobody sees them
        chosen, length = rows[:, length].copy(), length + 1
        if call.streamer is not None:
            call.streamer.put(torch.from_numpy(chosen))
        running &= ~np.isin(chosen, call.eos)
        if call.stops:
            said = torch.from_numpy(rows[:, :length]).to(device)
            running &= ~call.stops(said, None).cpu().numpy()  # type: ignore[arg-type]
        if not running.any():
            break
        goes_on[:] = running | (not ends)
    if call.streamer is not None:
        call.streamer.end()
    return torch.from_numpy(rows[:, :length].copy()).to(device)
