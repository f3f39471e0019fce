"""The written pass over adapters, biases and whole modules that someone else owns.

Their values are copied into a flat buffer of this pass before each use, and gradients are copied out of it. They are not
aliased: PEFT and trainers replace, cast and save parameters as they like, and a forward may wait for its backward while another
runs. A copy reads and writes the adapters once: 168 MB at rank 16 of an 8B model, about 0.1 ms on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from jaxsloth.backend import BuildOptions
from jaxsloth.batch import Batch
from jaxsloth.functional_model import Weights
from jaxsloth.models.names import lora_names
from jaxsloth.models.spec import Lora, ModelSpec
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.objective import Tensors
from jaxsloth.torch_backend.optimizer import Flat
from jaxsloth.torch_backend.written_program import WrittenProgram

SEPARATOR = "|"  # of the layers that a group's name is made of
RngKey = tuple[int, int] | None
Gradients = dict[str, tuple[torch.Tensor, ...]]


def members(group: str) -> list[str]:
    return group.split(SEPARATOR)


def external_spec(spec: ModelSpec, weights: Weights, dropout: float) -> ModelSpec:
    """The model's spec with these adapters, whose scaling is folded into B, and with what stands in place of base tensors."""
    adapters = {group: pair for group, pair in weights.items() if len(pair) == 2}
    modules = tuple(module for group in adapters for module in members(group))
    saved = tuple(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    bias = "all" if any(name.endswith(".bias") for name in weights) else "none"
    rank = max((a.shape[1] for a, _ in adapters.values()), default=0)
    lora = Lora(rank, 1.0, 1.0, dropout, modules, modules_to_save=saved, bias=bias)
    return replace(spec, lora=lora if weights else None)


class FunctionalPass:
    """A `WrittenProgram` as a function of weights shaped like `weights`; see `jaxsloth.functional_model` for the stacks.

    While it runs, the decoder's layers must hold `leaves`.
    """

    def __init__(self, decoder: Decoder, spec: ModelSpec, weights: Weights, options: BuildOptions, dropout: float) -> None:
        values: dict[str, np.ndarray] = {}
        for group, own in weights.items():
            values |= {name: np.zeros(shape, np.float32) for name, shape in _named(group, own).items()}
        self._flat = flat = Flat(values, decoder.device)
        self.leaves: dict[str, tuple[nn.Parameter, ...]] = {}
        self._gradients: dict[str, tuple[list[torch.Tensor], ...]] = {}
        self._names = {group: list(_named(group, own)) for group, own in weights.items()}
        for group, own in weights.items():
            names, count = self._names[group], len(own)
            owners = [group] if count == 1 else members(group)
            for place, owner in enumerate(owners):
                self.leaves[owner] = tuple(flat.parameters[name] for name in names[place * count : (place + 1) * count])
            views = [flat.view(flat.gradient, name) for name in names]
            self._gradients[group] = tuple(views[part::count] for part in range(count))
        own_spec = external_spec(spec, weights, dropout)
        self._program = WrittenProgram(decoder, own_spec, options.gradient_checkpointing, options.compute)
        self._device = decoder.device
        self._one = torch.ones((), dtype=torch.float32, device=decoder.device)

    def loss(self, weights: Weights, batch: Batch, rng_key: RngKey) -> torch.Tensor:
        """The summed cross entropy, float32."""
        self._begin(weights, 0)
        return self._program.row_losses(batch, inputs=self._inputs(rng_key)).sum()

    def loss_and_gradients(self, weights: Weights, batch: Batch, rng_key: RngKey) -> tuple[torch.Tensor, Gradients]:
        """(the summed cross entropy, each group's stacked gradients), in memory of their own."""
        self._begin(weights, batch.input_ids.size)
        self._flat.gradient.zero_()
        inputs = {"factor": self._one} | self._inputs(rng_key)
        loss = self._program.add_gradients(batch, CausalLoss(), inputs).clone()
        return loss, self._stacked()

    def hidden(
        self, weights: Weights, batch: Batch, rng_key: RngKey, learns: bool
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Gradients]]:
        """(normed hidden states ``[tokens, hidden]``, a function from their gradient to the groups', to be called once)."""
        tokens = batch.input_ids.size if learns else 0
        self._begin(weights, tokens)
        found, backward = self._program.hidden(batch, learns, self._inputs(rng_key))

        def pull(dhidden: torch.Tensor) -> Gradients:
            self._begin(weights, tokens)  # another forward may have brought its own since
            self._flat.gradient.zero_()
            backward(dhidden)
            return self._stacked()

        return found, pull

    def _inputs(self, rng_key: RngKey) -> Tensors:
        return {} if rng_key is None else {"rng_key": torch.tensor(rng_key, device=self._device)}

    @torch.no_grad()
    def _begin(self, weights: Weights, tokens: int) -> None:
        """Takes the values over; without any the adapters are nothing, and the pass is the base model's. tokens: as in
        `WrittenProgram.begin`."""
        if weights:
            rows = [row for own in weights.values() for row in _rows(own)]
            own = [
                self._flat.parameters[name].data
                for group, own in weights.items()
                for part in range(len(own))
                for name in self._names[group][part :: len(own)]
            ]
            torch._foreach_copy_(own, rows)
        else:
            self._flat.buffer.zero_()
        self._program.begin(tokens)

    def _stacked(self) -> Gradients:
        return {
            group: (views[0][0].clone(),) if len(views) == 1 else tuple(torch.stack(part) for part in views)
            for group, views in self._gradients.items()
        }


def _named(group: str, own: tuple[torch.Tensor, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of a group's single tensors by name: A and B of one layer after another, or the whole tensor."""
    if len(own) == 1:
        return {group: tuple(own[0].shape)}
    return {
        name: tuple(stack.shape[1:]) for module in members(group) for name, stack in zip(lora_names(module), own, strict=True)
    }


def _rows(own: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [own[0]] if len(own) == 1 else [row for stack in own for row in stack.unbind()]
