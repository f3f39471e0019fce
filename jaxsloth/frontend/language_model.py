"""The model that `FastLanguageModel` hands out: the module model, with its tokenizer, cached decoding and saving."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jaxsloth.frontend import decoding, saving
from jaxsloth.frontend.adapters import push_for_inference
from jaxsloth.frontend.arguments import refuse_unknown, warn_once
from jaxsloth.frontend.loading import Loaded
from jaxsloth.frontend.module.cached_rows import CachedRows, WholeRows
from jaxsloth.frontend.module.causal_lm import JaxslothForCausalLM
from jaxsloth.frontend.module.inputs import check_input_ids, take_apart
from jaxsloth.frontend.module.passes import Prepared
from jaxsloth.frontend.shared_weights import SharedWeights
from jaxsloth.generation import GenerationSettings, answer_texts, answering, generate

_TEXT_SETTINGS = (*inspect.signature(GenerationSettings).parameters, "on_text")


class FastModelForCausalLM(JaxslothForCausalLM):
    """A `transformers.PreTrainedModel` on both backends. loaded: what computes and where it came from.

    shared: what a native trainer trains, while it runs; who reads PEFT's parameters asks it first.
    """

    max_seq_length: int
    shared: SharedWeights | None

    @classmethod
    def of(cls, loaded: Loaded, max_seq_length: int) -> FastModelForCausalLM:
        made = cls.over(loaded.model, loaded.checkpoint.config, loaded.checkpoint.name)
        assert isinstance(made, FastModelForCausalLM)
        # Kept out of torch's sight: no part of this module.
        made.__dict__["loaded"] = loaded
        made.max_seq_length = max_seq_length
        made.shared = None
        made.generation_config = decoding.generation_config(made.generation_config, loaded.checkpoint)
        made.__dict__["checkpoint_ends"] = decoding.end_ids(made.generation_config)
        if made.device.index:  # else transformers' Trainer would spread the model over all GPUs that it sees
            made.__dict__["hf_device_map"] = {"": made.device}
        return made

    def prepare(self, input_ids: torch.Tensor, *arguments: Any, **settings: Any) -> Prepared:
        if self.shared is not None:
            self.shared.to_module()
        if self.max_seq_length < min(input_ids.shape[1], self.engine.model.spec.max_positions):
            warn_once(f"rows longer than max_seq_length={self.max_seq_length}, which the model was loaded with, are run whole")
        return super().prepare(input_ids, *arguments, **settings)

    @property
    def loaded(self) -> Loaded:
        return self.__dict__["loaded"]

    @property
    def backend(self) -> str:
        return self.loaded.backend.name

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    def generate(self, inputs: Any = None, generation_config: Any = None, **settings: Any) -> Any:
        """Answers as transformers does (`inputs` a tensor, or input_ids=…), or a text, texts or rows of token ids.

        Tensors: transformers' arguments and its output, ``[batch, prompt + answer]``. What `decoding` has not (beams,
        processors of logits, scores) transformers' own loop does over the same KV cache; a whole pass a token it takes with
        use_cache=False, an assistant, guidance_scale, and prompts with padding elsewhere than on the left. A tokenizer's batch
        may stand in the place of its input_ids.

        Texts and rows: `GenerationSettings`' fields and on_text, called with (row, new text). What came in comes out answered:
        a text, a list of texts, or a list of lists of new token ids. Special tokens written out in a text (a rendered chat
        template) count as such, and none are added to it.
        """
        if isinstance(inputs, Mapping):
            inputs, settings = None, take_apart(inputs, settings)
        elif isinstance(settings.get("input_ids"), Mapping):
            settings = take_apart(settings.pop("input_ids"), settings)
        if isinstance(inputs, str) or (isinstance(inputs, Sequence) and not isinstance(inputs, torch.Tensor)):
            return self._answer(inputs, settings)
        for ids in (inputs, settings.get("input_ids")):
            if ids is not None:
                check_input_ids(ids)
        settings = decoding.with_ends(self, generation_config, settings)
        prepared = decoding.prepare(self, inputs, generation_config, settings)
        if prepared is None:
            if settings.get("custom_generate") is not None:
                settings["use_cache"] = False  # it may ask of a cache what only transformers' have
            settings.setdefault("tokenizer", self.tokenizer)  # stop strings and token healing need one
            return super().generate(inputs, generation_config=generation_config, **settings)  # type: ignore[misc]
        push_for_inference(self)
        return decoding.decode(self.engine.model, prepared)

    def _prepare_cache_for_generation(self, generation_config: Any, *others: Any) -> None:
        inputs, mode, _, capacity = others
        if isinstance(inputs.get("past_key_values"), WholeRows):
            super()._prepare_cache_for_generation(generation_config, *others)
            return
        if generation_config.use_cache and decoding.drafts(generation_config, mode):
            inputs["past_key_values"] = WholeRows()
            return
        generation_config.use_cache = decoding.caches(generation_config, inputs, mode)
        if generation_config.use_cache:
            push_for_inference(self)
            inputs["past_key_values"] = CachedRows(self.engine.model, capacity)

    def _answer(self, prompts: Any, settings: dict[str, Any]) -> Any:
        refuse_unknown("generate", _TEXT_SETTINGS, {k: v for k, v in settings.items() if k not in _TEXT_SETTINGS})
        on_text = settings.pop("on_text", None)
        if settings.get("eos_ids") is None:
            config, own = self.generation_config, decoding.with_ends(self, None, {}).get("eos_token_id")
            settings["eos_ids"] = decoding.end_ids(config) if own is None else tuple(own)
        chosen = GenerationSettings(**answering(self.generation_config.to_dict(), settings))
        push_for_inference(self)
        model, tokenizer = self.engine.model, self.tokenizer
        if isinstance(prompts, str):
            return answer_texts(model, tokenizer, [prompts], chosen, on_text)[0]
        if all(isinstance(prompt, str) for prompt in prompts):
            return answer_texts(model, tokenizer, prompts, chosen, on_text)
        return generate(model, prompts, chosen, tokenizer=tokenizer, on_text=on_text)

    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        **settings: Any,
    ) -> None:
        """See `saving.save_merged`."""
        saving.save_merged(self, Path(save_directory), tokenizer, save_method, **settings)

    def push_to_hub_merged(
        self, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **settings: Any
    ) -> str:
        """See `saving.push_merged`."""
        return saving.push_merged(self, repo_id, tokenizer, save_method, **settings)

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "q8_0",
        **settings: Any,
    ) -> list[Path]:
        """See `saving.save_gguf`."""
        return saving.save_gguf(self, Path(save_directory), tokenizer, quantization_method, **settings)

    def push_to_hub_gguf(
        self, repo_id: str, tokenizer: Any = None, quantization_method: str | Sequence[str] = "q8_0", **settings: Any
    ) -> str:
        """See `saving.push_gguf`."""
        return saving.push_gguf(self, repo_id, tokenizer, quantization_method, **settings)

    def save_pretrained(
        self, save_directory: str | Path, *arguments: Any, save_format: str | None = None, **settings: Any
    ) -> None:
        """See `saving.save_as`; without save_format there is nothing to save but adapters, which PEFT's model saves."""
        if save_format is None:
            super().save_pretrained(save_directory, *arguments, **settings)
        saving.save_as(self, Path(save_directory), str(save_format), **settings)
