"""The written-out pass over adapters that someone else owns.

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
from jaxsloth.bridge import Weights
from jaxsloth.models.names import lora_names
from jaxsloth.models.spec import Lora, ModelSpec
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.objective import SUMMED
from jaxsloth.torch_backend.optimizer import Flat
from jaxsloth.torch_backend.passes import FastPass

SEPARATOR = "|"  # of the layers that a group's name is made of


def members(group: str) -> list[str]:
    return group.split(SEPARATOR)


def guest_spec(spec: ModelSpec, weights: Weights, dropout: float) -> ModelSpec:
    """The model's spec with these adapters, whose scaling is folded into B, and with what stands in place of base tensors."""
    adapters = {group: pair for group, pair in weights.items() if len(pair) == 2}
    modules = tuple(module for group in adapters for module in members(group))
    saved = tuple(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    bias = "all" if any(name.endswith(".bias") for name in weights) else "none"
    rank = max((a.shape[1] for a, _ in adapters.values()), default=0)
    lora = Lora(rank, 1.0, 1.0, dropout, modules, modules_to_save=saved, bias=bias)
    return replace(spec, lora=lora if weights else None)


class Guest:
    """A `FastPass` over adapters shaped like `adapters`; see `jaxsloth.bridge.Bridge` for the stacks.

    While it runs, the decoder's layers must hold `leaves`.
    """

    def __init__(self, decoder: Decoder, spec: ModelSpec, adapters: Weights, options: BuildOptions) -> None:
        values: dict[str, np.ndarray] = {}
        for group, pair in adapters.items():
            for module in members(group):
                values |= {
                    name: np.zeros(stack.shape[1:], np.float32) for name, stack in zip(lora_names(module), pair, strict=True)
                }
        self._flat = flat = Flat(values, decoder.device)
        parameters = flat.parameters
        self.leaves: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self._gradients: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for group in adapters:
            pairs = [lora_names(module) for module in members(group)]
            self.leaves |= {m: (parameters[a], parameters[b]) for m, (a, b) in zip(members(group), pairs, strict=True)}
            views = [(flat.view(flat.gradient, a), flat.view(flat.gradient, b)) for a, b in pairs]
            self._gradients[group] = [a for a, _ in views], [b for _, b in views]
        self._fast = FastPass(decoder, guest_spec(spec, adapters, 0.0), options.gradient_checkpointing, options.compute)
        self._one = torch.ones((), dtype=torch.float32, device=decoder.device)

    def loss(self, adapters: Weights, batch: Batch) -> torch.Tensor:
        """The summed cross entropy, float32."""
        self._begin(adapters, 0)
        return self._fast.row_losses(batch).sum()

    def loss_and_gradients(self, adapters: Weights, batch: Batch) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """(the summed cross entropy, each group's stacked gradients of A and B), in memory of their own."""
        self._begin(adapters, batch.input_ids.size)
        self._flat.gradient.zero_()
        loss = self._fast.add_gradients(batch, SUMMED, {"factor": self._one}).clone()
        return loss, self._stacked()

    def hidden(
        self, adapters: Weights, batch: Batch, learns: bool
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], dict[str, list[torch.Tensor]]]]:
        """(normed hidden states ``[tokens, hidden]``, a function from their gradient to the groups', to be called once)."""
        tokens = batch.input_ids.size if learns else 0
        self._begin(adapters, tokens)
        found, backward = self._fast.hidden(batch, learns)

        def pull(dhidden: torch.Tensor) -> dict[str, list[torch.Tensor]]:
            self._begin(adapters, tokens)  # another forward may have brought its own since
            self._flat.gradient.zero_()
            backward(dhidden)
            return self._stacked()

        return found, pull

    @torch.no_grad()
    def _begin(self, adapters: Weights, tokens: int) -> None:
        """Takes the values over; without any the adapters are nothing, and the pass is the base model's. tokens: as in
        `FastPass.begin`."""
        if adapters:
            rows = [row for stacks in adapters.values() for stack in stacks for row in stack.unbind()]
            own = [self.leaves[module][part].data for group in adapters for part in (0, 1) for module in members(group)]
            torch._foreach_copy_(own, rows)
        else:
            self._flat.buffer.zero_()
        self._fast.begin(tokens)

    def _stacked(self) -> dict[str, list[torch.Tensor]]:
        return {group: [torch.stack(views) for views in both] for group, both in self._gradients.items()}
