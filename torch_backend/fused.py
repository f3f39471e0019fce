"""Loss and gradients of a pre-norm decoder by a forward and a backward pass written out, without autograd.

What autograd would hide is decided here and in layer_pass.py: which activations are kept, recomputed or sent to the host; which
buffers are written over; and that both directions of every group of linear layers are one product (groups.py). A pass leaves
the gradients of all adapters added up in their flat buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from jaxsloth.kernels.linear_cross_entropy import torch_ops as loss_ops
from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.fp8 import Fp8Weights
from jaxsloth.torch_backend.groups import ExactWeights, Weights
from jaxsloth.torch_backend.layer_pass import Batch, Kernels, LayerPass, wide_rows
from jaxsloth.torch_backend.objective import Objective, Tensors, by_row
from jaxsloth.torch_backend.offload import Stash


@dataclass
class Forward:
    """What a forward pass leaves to the backward. normed: the final norm's output ``[tokens + 1, hidden]``, and later its
    gradient; x: the stream before that norm, rstd its reciprocals; layers: what each layer keeps, on the host where there is a
    stash."""

    normed: torch.Tensor
    x: torch.Tensor
    rstd: torch.Tensor
    layers: list[Any]
    stash: Stash | None


class FusedPass:
    """Loss and gradients of a whole model.

    keeps_weights: hold every weight as products take it, instead of rebuilding it for each use. compute: a `ComputeName`.
    """

    def __init__(self, decoder: Decoder, spec: specs.ModelSpec, keeps_weights: bool, compute: str = "exact") -> None:
        self._decoder, self._spec, self._mode = decoder, spec, "none"
        self._kernels = Kernels.of(decoder.ops)
        self._layers = [
            LayerPass(block, layer, self._kernels) for block, layer in zip(decoder.model.layers, spec.layers, strict=True)
        ]
        every = [group for layer in self._layers for group in layer.groups]
        make = Fp8Weights if compute == "fp8" else ExactWeights
        self._weights: Weights = make(every, decoder.dtype, decoder.device, keeps_weights, self._kernels.weights)
        self._stash: Stash | None = None
        self._made: Stash | None = None  # outlives its use: graphs that were recorded with it need its memory
        trained = [index for index, layer in enumerate(self._layers) if any(group.rank for group in layer.groups)]
        self._first = trained[0] if trained else len(self._layers)

    def keep(self, mode: str, inputs_only: bool = False) -> None:
        """What forward passes keep from now on; forwards that wait for their backward are not touched.

        mode: a `gradient_checkpointing`. inputs_only: mode "offload" keeps what "full" does, and sends that to the host.
        """
        self._mode = "full" if inputs_only else mode
        offloads = mode == "offload" and self._decoder.device.type == "cuda"
        if offloads and self._made is None:
            self._made = Stash(self._decoder.device)
        self._stash = self._made if offloads else None

    def begin(self) -> None:
        """Takes over the adapters' current values; call it once a step."""
        self._weights.begin()

    @torch.no_grad()
    def row_losses(self, batch: Batch, smoothing: float) -> torch.Tensor:
        """The cross entropy summed by row, float32 ``[rows]``."""
        normed = self._forward(batch, None).normed
        return by_row(self._head(normed, batch, smoothing, gradient=False)[0], batch.chosen, batch.shape)

    @torch.no_grad()
    def add_gradients(self, batch: Batch, objective: Objective, tensors: Tensors) -> torch.Tensor:
        """What the objective makes of the losses; its gradients by the adapters are added to theirs."""
        forward = self._forward(batch, self._mode)
        losses, dhidden = self._head(forward.normed, batch, objective.smoothing, gradient=True)
        assert dhidden is not None
        result, slopes = objective.weigh(losses, batch.chosen, batch.shape, tensors)
        dhidden.mul_(slopes if slopes.dim() == 0 else slopes[:, None])
        forward.normed.zero_().index_copy_(0, batch.chosen, dhidden)
        del dhidden
        self._backward(batch, forward)
        return result

    @torch.no_grad()
    def hidden(self, batch: Batch, learns: bool) -> tuple[torch.Tensor, Forward | None]:
        """(the final norm's output ``[tokens, hidden]``, what `backward` needs of it where something is learnt)."""
        forward = self._forward(batch, self._mode if learns else None)
        return forward.normed[:-1], forward if learns else None

    @torch.no_grad()
    def backward(self, batch: Batch, forward: Forward, dhidden: torch.Tensor) -> None:
        """Adds the adapters' gradients, given that of `hidden`'s output, to theirs. The adapters must be those of the forward
        (`begin`), which can be used once."""
        self._weights.forget()
        forward.normed = dhidden  # the output's own memory is the caller's
        self._backward(batch, forward)

    def _backward(self, batch: Batch, forward: Forward) -> None:
        """From the gradient of the final norm's output, the first rows of `forward.normed`; uses the forward up."""
        tokens, hidden = forward.x.shape
        room = max(layer.stream_room for layer in self._layers)
        d = wide_rows(tokens, hidden, room, forward.x)
        norm, weight, kept = self._spec.norm, self._decoder.model.norm.weight, forward.layers
        assert norm is not None
        self._kernels.norm.add_norm_backward(
            forward.normed[:tokens], forward.x, weight, forward.rstd, None, d[:, :hidden], offset=norm.weight_offset
        )
        del forward.normed, forward.x
        for index in range(len(self._layers) - 1, self._first - 1, -1):
            saved = kept[index] if forward.stash is None else forward.stash.get(kept, index, self._first)
            self._layers[index].backward(d, saved, batch, self._weights, index == self._first)
            kept[index] = None

    def _forward(self, batch: Batch, mode: str | None) -> Forward:
        decoder, kept = self._decoder, []
        self._weights.forget()
        x = torch.nn.functional.embedding(batch.input_ids.flatten(), decoder.model.embed_tokens.weight).to(decoder.dtype)
        if self._spec.embedding.scale != 1.0:
            x = x * torch.tensor(self._spec.embedding.scale, dtype=x.dtype, device=x.device)
        if batch.noise is not None:
            x = x + batch.noise.flatten(0, 1).to(x.dtype)
        delta = None
        for index, layer in enumerate(self._layers):
            x, delta, saved = layer.forward(x, delta, batch, self._weights, mode if index >= self._first else None)
            kept.append(self._stash.put(saved) if self._stash is not None and saved is not None else saved)
        norm = self._spec.norm
        assert norm is not None and delta is not None
        # One more row, which the filling of `chosen` points at.
        normed = x.new_zeros(x.shape[0] + 1, x.shape[1])
        total = torch.empty_like(x)
        rstd = self._kernels.norm.add_norm(
            x, delta, decoder.model.norm.weight, normed[:-1], eps=norm.eps, offset=norm.weight_offset, total=total
        )
        return Forward(normed, total, rstd, kept, self._stash)

    def _head(
        self, normed: torch.Tensor, batch: Batch, smoothing: float, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the loss of every target, the gradient of each by its own hidden state)."""
        hidden = normed.index_select(0, batch.chosen)
        weight, cap = self._decoder.lm_head.weight, self._spec.head.soft_cap
        chunk = loss_ops.default_chunk(hidden.shape[0], weight.shape[0])
        softmax = partial(self._kernels.loss.softmax, label_smoothing=smoothing)
        losses, dhidden, _ = loss_ops.losses_and_gradients(
            hidden, weight, batch.targets, cap, -100, chunk, (gradient, False), softmax
        )
        return losses, dhidden
