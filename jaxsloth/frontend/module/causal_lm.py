"""A causal language model that is a `transformers.PreTrainedModel` to torch, PEFT and trainers, and computes in a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from jaxsloth.backend import CheckpointingName, Model
from jaxsloth.batch import IGNORE, check_length
from jaxsloth.frontend.arguments import warn_once
from jaxsloth.frontend.module.cached_rows import CachedRows, WholeRows
from jaxsloth.frontend.module.inputs import asked_by, make_tokens, refuse_inputs, shift_labels, take_apart
from jaxsloth.frontend.module.passes import Prepared, to_torch
from jaxsloth.frontend.module.peft_adoption import Active, active_parts
from jaxsloth.frontend.module.placeholders import Placeholder, Placeholders
from jaxsloth.frontend.module.skeleton import fill, head, tie
from jaxsloth.functional_model import FunctionalModel, Output, PassOptions
from jaxsloth.models.names import EMBEDDING, LM_HEAD
from jaxsloth.transforms import SAVEABLE, saved_modules


@dataclass(frozen=True)
class Engine:
    """What computes. Copies of a model share it, since its weights are never written."""

    model: Model
    functional: FunctionalModel

    def __deepcopy__(self, memo: Any) -> Engine:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("the base weights of this model are not in torch, so it can't be pickled; save its adapter instead")


class CausalOutput(CausalLMOutputWithPast):
    """Logits that were left out are made when `logits` is read, once."""

    def later(self, make: Callable[[], torch.Tensor], active: Active) -> None:
        """make: what makes the logits, from what is `active` as it is now."""
        self.__dict__["make"], self.__dict__["versions"] = make, active.versions()
        self.__dict__["active"] = active

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name != "logits" or value is not None or "make" not in self.__dict__:
            return value
        if self.__dict__["versions"] != self.__dict__["active"].versions():
            raise RuntimeError(
                "the adapters were written since this output was made; ask for its logits with output_logits=True"
            )
        self.logits = self.__dict__.pop("make")()
        return self.logits

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """In transformers' order, with the logits."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)


class Backbone(nn.Module):
    """What Hugging Face calls ``model``. `compute` of its owner runs it."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """The normed hidden states ``[batch, length, hidden]``, differentiable by the LoRA weights."""
        owner = self.__dict__["owner"]
        ids = refuse_inputs(input_ids, position_ids, asked_by(owner.config) | others)
        cached = owner.cache(past_key_values, use_cache)
        whole = (ids, attention_mask, position_ids)
        if cached is not None:
            whole = cached.append(*whole)
        hidden = owner.prepare(*whole, packed=cached is None).run("hidden")[:, -ids.shape[1] :]
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cached)  # type: ignore[arg-type]


def _whole(engine: Engine, name: str) -> nn.Module:
    """The base's embedding or head as a torch module of its own, float32, to be trained in its place.

    Raises:
        ValueError: the two are one weight.
    """
    saved_modules(engine.model.spec, [name])
    weight = to_torch(engine.functional.base_weight(name)).to(torch.float32, copy=True)
    if name == EMBEDDING:
        return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


class JaxslothForCausalLM(PreTrainedModel, GenerationMixin):
    """The modules hold no base weight: `engine` computes, with the LoRA weights that PEFT added to the modules.

    The name ends as it does because trainers tell by it that the loss shifts labels.
    """

    config_class = PretrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = []  # noqa: RUF012 (transformers reads a class attribute)

    def __init__(self, config: PretrainedConfig, model: Model) -> None:
        super().__init__(config)
        engine = Engine(model, model.functional())
        dtype, device = getattr(torch, model.options.dtype), torch.device(engine.functional.device)
        self.model = Backbone(config)

        def base(name: str) -> torch.Tensor:
            return torch.tensor(model.base_tensor(name), dtype=torch.float32, device=device)

        fill(self.model, model.spec, Placeholders(dtype, device, base))
        self.lm_head = head(to_torch(engine.functional.base_weight(LM_HEAD)))
        if model.spec.head.tied:
            tie(self.model.embed_tokens, self.lm_head)  # type: ignore[arg-type]
        for name in SAVEABLE:
            self.get_submodule(name).__dict__["whole"] = partial(_whole, engine, name)
        # Kept out of torch's sight: neither is a part of this module.
        self.__dict__["engine"] = engine
        self.model.__dict__["owner"] = self
        self.eval()

    @classmethod
    def over(cls, model: Model, config: Mapping[str, Any], name: str) -> JaxslothForCausalLM:
        """The module of a built model. config: the checkpoint's config.json; name: where adapters say that their base is."""
        fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
        made = AutoConfig.for_model(config["model_type"], **fields)
        made.name_or_path = name
        return cls(made, model)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalOutput | tuple[torch.Tensor, ...]:
        """As transformers' causal models: the loss is the mean over valid labels, or their sum over num_items_in_batch.
        past_key_values of an output (use_cache, or the config's) go on where it ended.

        Where there are labels and something may be learnt, logits are not made until `output.logits` is read (or
        output_logits=True asks for them). A tokenizer's whole batch in the place of input_ids is taken apart.
        """
        if isinstance(input_ids, Mapping):
            others |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
            others |= {"inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache}
            return self.forward(**take_apart(input_ids, others), logits_to_keep=logits_to_keep)
        others = asked_by(self.config) | others
        return_tuple = others.pop("return_dict", getattr(self.config, "return_dict", True)) is False
        shifted, items = others.pop("shift_labels", None), others.pop("num_items_in_batch", None)
        learns = not return_tuple and (self.training or torch.is_grad_enabled())
        wants_logits = others.pop("output_logits", not learns or (labels is None and shifted is None))
        ids = refuse_inputs(input_ids, position_ids, others | {"inputs_embeds": inputs_embeds})
        if isinstance(past_key_values, CachedRows):
            return CausalOutput(logits=past_key_values.append(ids, attention_mask), past_key_values=past_key_values)  # type: ignore[arg-type]
        targets = shift_labels(labels) if shifted is None and labels is not None else shifted
        cached, whole, new = self.cache(past_key_values, use_cache), (ids, attention_mask, position_ids), ids.shape[1]
        if cached is not None:
            whole = cached.append(*whole)
            if targets is not None:
                targets = functional.pad(targets, (whole[0].shape[1] - new, 0), value=IGNORE)
        prepared = self.prepare(*whole, targets, packed=cached is None)

        def run(output: Output, keep: int | torch.Tensor = 0) -> torch.Tensor:
            """On the batch's GPU where that is another: transformers' trainers feed the first."""
            chosen = keep if isinstance(keep, torch.Tensor) else min(keep, new) or (new if new < prepared.length else 0)
            found = prepared.run(output, 0 if isinstance(chosen, torch.Tensor) else chosen)
            if isinstance(chosen, torch.Tensor):
                found = _kept(found[:, -new:], chosen.to(found.device))
            return found.to(ids.device) if found.device.type == ids.device.type else found

        make_logits = partial(run, "logits", keep=logits_to_keep)
        logits = make_logits() if wants_logits else None
        loss = None
        if targets is not None:
            every = not isinstance(logits_to_keep, torch.Tensor) and not logits_to_keep
            if logits is not None and every and not torch.is_grad_enabled():
                flat = targets[:, -new:].flatten().to(logits.device, torch.long)
                total = functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORE, reduction="sum")
            else:
                total = run("loss")
            if items is None:
                assert prepared.tokens.targets is not None
                items = int((prepared.tokens.targets != IGNORE).sum())
            loss = total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)
        if return_tuple:
            return tuple(part for part in (loss, logits, cached) if part is not None)  # type: ignore[misc]
        output = CausalOutput(loss=loss, logits=logits, past_key_values=cached)  # type: ignore[arg-type]
        if logits is None:
            output.later(make_logits, prepared.active)
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts adapters; of a cast it is said that the base stays as it is."""
        cast = fn(torch.empty(0, dtype=self.dtype)).dtype
        if cast != self.dtype:
            warn_once(
                f"a cast to {cast} casts adapters alone: the base computes in {self.dtype}, in which it was loaded "
                f"(from_pretrained(dtype={cast}) loads it in that)"
            )
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        """The one door of torch's load_state_dict, PEFT's from_pretrained, load_adapter and set_peft_model_state_dict.

        Raises:
            ValueError: an adapter's value, or one of what is trained whole, is NaN or infinite.
        """
        for name, value in state_dict.items():
            own = isinstance(value, torch.Tensor) and not isinstance(value, Placeholder)
            if own and name.startswith(prefix) and value.is_floating_point() and not bool(value.isfinite().all()):
                wrong = value[~value.isfinite()]
                raise ValueError(f"{name} must hold finite values, got {len(wrong)} others, the first {float(wrong[0])}")
        super()._load_from_state_dict(state_dict, prefix, *others)

    def cache(self, past: Any, use_cache: bool | None) -> WholeRows | None:
        """What the rows of a pass are kept in, where transformers keeps keys and values: `past`, or a new one.

        Raises:
            ValueError: `past` is none of this model's.
        """
        if past is not None and not isinstance(past, WholeRows):
            raise ValueError(
                f"forward got past_key_values ({type(past).__name__}), which a model of jaxsloth does not take; leave it out "
                "of the first call, and give the output's past_key_values to the next"
            )
        recomputes = self.model.gradient_checkpointing and self.training
        asked = getattr(self.config, "use_cache", None) if use_cache is None else use_cache
        return WholeRows() if past is None and asked and not recomputes else past

    def prepare(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        targets: torch.Tensor | None = None,
        packed: bool = True,
    ) -> Prepared:
        """The batch and what PEFT has active now, ready to be run. packed: positions that begin anew begin a document."""
        functional = self.engine.functional
        active = active_parts(self, self.engine.model.spec)
        rates = {adapter.dropout if adapter.training else 0.0 for adapter in active.adapters.values()} or {0.0}
        if len(rates) > 1:
            raise ValueError(f"all adapters must have one dropout rate, got {sorted(rates)}")
        rate = rates.pop()
        spec = self.engine.model.spec
        check_length(input_ids.shape[1], spec.max_positions)
        vocab = spec.embedding.vocab
        tokens = make_tokens(functional, input_ids, attention_mask, position_ids, targets, rate > 0, vocab, packed)
        options = PassOptions(rate, self._checkpointing())
        return Prepared(functional, active, tokens, options, input_ids.shape[1])

    def _checkpointing(self) -> CheckpointingName:
        """The model's own way of keeping activations where it is switched on, as transformers' flag is: in training. Where
        that is none, who switched it on asked for transformers' way: blocks are run again."""
        name = self.engine.model.options.gradient_checkpointing
        if not (self.model.gradient_checkpointing and self.training):
            return "auto" if name == "auto" else "none"
        return "full" if name == "none" else name

    def _prepare_cache_for_generation(self, generation_config: Any, *others: Any) -> None:
        """transformers' `generate` asks it. Nothing is cached, unless a pass of before is gone on from: every token runs the
        whole row."""
        generation_config.use_cache = isinstance(others[0].get("past_key_values"), WholeRows)

    def save_pretrained(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise NotImplementedError(
            "the base weights of this model are not in torch; save the adapter (PeftModel.save_pretrained), or write a merged "
            "checkpoint (save_pretrained_merged)"
        )

    def resize_token_embeddings(self, *arguments: Any, **settings: Any) -> NoReturn:
        raise NotImplementedError("the vocabulary of a model of jaxsloth can't be resized; choose tokens that it has")

    @property
    def engine(self) -> Engine:
        return self.__dict__["engine"]

    def _get_name(self) -> str:
        # Trainers that smooth labels look the name up among transformers' own to learn that labels are to be shifted.
        return (getattr(self.config, "architectures", None) or [type(self).__name__])[0]


def _kept(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What a tensor of logits_to_keep leaves of ``[batch, length, …]``: the positions of all rows ``[n]``, each row's own
    ``[batch, n]``, or, where it is a mask ``[batch, length]``, what it says, flat."""
    if positions.dim() == 2 and positions.dtype != torch.bool:
        return torch.take_along_dim(states, positions[..., None], dim=1)
    return states[positions] if positions.dim() == 2 else states[:, positions]
