"""A causal language model that is a `transformers.PreTrainedModel` to torch, PEFT and trainers, and computes in a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from jaxsloth.backend import Bridge, Model, Output, PassOptions
from jaxsloth.frontend.module.inputs import make_tokens, refuse_inputs, shift_labels
from jaxsloth.frontend.module.passes import Pass, to_torch
from jaxsloth.frontend.module.peft_adoption import active_adapters, check_base
from jaxsloth.frontend.module.skeleton import Hollow, fill, head
from jaxsloth.models.names import EMBEDDING, linears


@dataclass(frozen=True)
class Engine:
    """What computes. Copies of a model share it, since its weights are never written."""

    model: Model
    bridge: Bridge

    def __deepcopy__(self, memo: Any) -> Engine:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("the base weights of this model are not in torch, so it can't be pickled; save its adapter instead")


class Backbone(nn.Module):
    """What Hugging Face calls ``model``. `compute` of its owner runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """The normed hidden states ``[batch, length, hidden]``, differentiable by the LoRA weights."""
        ids = refuse_inputs(input_ids, others)
        hidden = self.__dict__["owner"].compute("hidden", ids, attention_mask, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


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
        engine = Engine(model, model.bridge())
        dtype, device = getattr(torch, model.options.dtype), torch.device(engine.bridge.device)
        self.model = Backbone()
        fill(self.model, model.spec, Hollow(dtype, device, engine.bridge.fingerprint()))
        self.lm_head = head(to_torch(engine.bridge.head_weight()))
        if model.spec.head.tied:
            self.model.get_submodule(EMBEDDING.rpartition(".")[2]).weight = self.lm_head.weight
        # Kept out of torch's sight: neither is a part of this module.
        self.__dict__["engine"] = engine
        self.model.__dict__["owner"] = self
        self.eval()

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
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """As transformers' causal models. With labels, logits are left out while training, unless output_logits=True."""
        return_tuple = others.pop("return_dict", True) is False
        wants_logits = others.pop("output_logits", None)
        shifted, items = others.pop("shift_labels", None), others.pop("num_items_in_batch", None)
        ids = refuse_inputs(input_ids, others | {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds})
        loss = logits = None
        if labels is not None or shifted is not None:
            targets = shift_labels(labels) if shifted is None else shifted
            total = self.compute("loss", ids, attention_mask, position_ids, targets)
            valid = (targets != -100).sum() if items is None else items
            loss = total / (valid.to(total.device) if isinstance(valid, torch.Tensor) else valid)
        if wants_logits or (wants_logits is None and (loss is None or not self.training)):
            logits = self.compute("logits", ids, attention_mask, position_ids, keep=logits_to_keep)
        if return_tuple:
            return tuple(part for part in (loss, logits) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits)  # type: ignore[arg-type]

    def compute(
        self,
        output: Output,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        targets: torch.Tensor | None = None,
        keep: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """One pass of the engine under the adapters that PEFT has active now."""
        bridge, spec = self.engine.bridge, self.engine.model.spec
        check_base(self)
        names = [linear.name for linear in linears(spec)]
        adapters = active_adapters(self, names)
        rates = {adapter.dropout for adapter in adapters.values()}
        if len(rates) > 1:
            raise ValueError(f"all adapters must have one dropout rate, and these came: {sorted(rates)}")
        rate = rates.pop() if rates else 0.0
        length = input_ids.shape[1]
        tokens = make_tokens(bridge, input_ids, attention_mask, position_ids, targets, drops=rate > 0)
        options = PassOptions(dropout=rate, recompute=self.model.gradient_checkpointing)
        result = Pass(bridge, output, bridge.groups(list(adapters)), adapters, tokens, options)()
        return result if output == "loss" else result[:, :length]

    @property
    def engine(self) -> Engine:
        return self.__dict__["engine"]

    def _get_name(self) -> str:
        # Trainers that smooth labels look the name up among transformers' own to learn that labels are to be shifted.
        return (getattr(self.config, "architectures", None) or [type(self).__name__])[0]
