"""Loss and gradients of a decoder by a forward and a backward pass over its blocks, without autograd over the whole.

The pass decides which activations are kept, recomputed or sent to the host, and which buffers are written over; bodies compute
(`body.Body`), and both directions of every group of linear layers are one product (linear.py). It leaves the gradients of all
that is trained added up in their flat buffer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jaxsloth.kernels.attention.library_ops import Layout
from jaxsloth.models import spec as specs
from jaxsloth.objectives.objective import Objective, RowObjective
from jaxsloth.torch_backend import block as blocks
from jaxsloth.torch_backend.augmented import ExactWeights
from jaxsloth.torch_backend.block import Kept
from jaxsloth.torch_backend.body import DefaultPair
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.fp8 import Fp8Weights
from jaxsloth.torch_backend.objective import Tensors, by_row, weigh
from jaxsloth.torch_backend.offload import ActivationOffload, Offloaded
from jaxsloth.torch_backend.run import AugmentedWeights, DropoutKey, Run, Tables, padded_rows


@dataclass(frozen=True)
class DeviceBatch:
    """One micro-batch on the device. target_positions: indices into the flat batch of the tokens that have a target, filled up
    with `tokens`; targets: theirs, filled up with the ignore index. tables: (cos, sin) ``[batch, length, half]`` a rotary
    setting. noise: float32 ``[batch, length, hidden]``, added to the embeddings."""

    input_ids: torch.Tensor
    layout: Layout
    tables: Tables
    target_positions: torch.Tensor
    targets: torch.Tensor
    noise: torch.Tensor | None = None
    dropout: DropoutKey | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, length)."""
        return self.layout.batch, self.layout.length


@dataclass
class Forward:
    """The part of a forward pass that its backward needs. normed: the final norm's output ``[tokens + 1, hidden]``, and later
    its gradient; x: the stream before that norm, rstd its reciprocals; layers: what each block keeps, whose offloaded tensors
    are in `away` where there is an offload."""

    normed: torch.Tensor
    x: torch.Tensor
    rstd: torch.Tensor
    layers: list[list[Kept] | None]
    away: list[Offloaded | None]
    offload: ActivationOffload | None
    run: Run


def make_pairs(decoder: Decoder) -> dict[Any, Any]:
    """Each body, or the `DefaultPair` in its place where it refuses its written pair with the adapters as they are now."""
    bodies = [branch.body for block in decoder.blocks for branch in block.branches]
    reasons = {body: body.written_refusal() for body in bodies}
    return {body: body if reason is None else DefaultPair(body, reason) for body, reason in reasons.items()}


def describe(decoder: Decoder) -> list[str]:
    """A line a kind of block on how it is trained, for logs: "4 blocks: self_attn: written; mlp: local vjp (a reason)"."""

    def ways(block: blocks.Block) -> str:
        passes = block.passes().items()
        return "; ".join(f"{name}: {'written' if reason is None else f'local vjp ({reason})'}" for name, reason in passes)

    return [f"{count} blocks: {kind}" for kind, count in Counter(map(ways, decoder.blocks)).items()]


def activation_widths(decoder: Decoder, lora: specs.Lora | None, pairs: Mapping[Any, Any], mode: str) -> tuple[int, int]:
    """Elements a token that a pass needs: (on the device, those kept and the most that one block works with; on the host)."""
    hidden = decoder.spec.hidden
    adapters = 0 if lora is None else lora.r * len(lora.modules)  # the products with A, kept in every mode
    kept = [blocks.kept_widths(block, pairs, hidden, mode) for block in decoder.blocks]
    working = max((blocks.working_width(block, pairs, hidden) for block in decoder.blocks), default=0)
    return adapters + working + sum(device for device, _ in kept), sum(host for _, host in kept)


class WrittenPass:
    """Loss and gradients of a whole model.

    keeps_weights: hold every weight as products take it, instead of rebuilding it for each use. compute: a `ComputeName`.
    """

    def __init__(self, decoder: Decoder, keeps_weights: bool, compute: str = "exact") -> None:
        self._decoder, self._mode = decoder, "none"
        self._blocks = decoder.blocks
        self.pairs = make_pairs(decoder)
        groups = [group for pair in self.pairs.values() for group in pair.groups().values()]
        make = Fp8Weights if compute == "fp8" else ExactWeights
        kernels = decoder.ops.kernels.weights
        self._weights: AugmentedWeights = make(groups, decoder.dtype, decoder.device, keeps_weights, kernels)
        self._offload: ActivationOffload | None = None
        self._made: ActivationOffload | None = None  # outlives its use: graphs that were recorded with it need its memory
        trained = [i for i, block in enumerate(self._blocks) if any(p.requires_grad for p in block.parameters())]
        self._trains_embedding = decoder.model.embed_tokens.weight.requires_grad
        self._trains_head = decoder.lm_head.table.requires_grad
        self._first = 0 if self._trains_embedding else trained[0] if trained else len(self._blocks)

    def keep(self, mode: str, inputs_only: bool = False) -> None:
        """Sets what forward passes keep from now on; forwards that wait for their backward are not touched.

        mode: a `gradient_checkpointing`. inputs_only: mode "offload" keeps what "full" does, and sends that to the host.
        """
        self._mode = "full" if inputs_only else mode
        offloads = mode == "offload" and self._decoder.device.type == "cuda"
        if offloads and self._made is None:
            self._made = ActivationOffload(self._decoder.device)
        self._offload = self._made if offloads else None

    def begin(self) -> None:
        """Takes over the adapters' current values; call it once a step."""
        self._weights.begin()

    @torch.no_grad()
    def row_losses(self, batch: DeviceBatch, smoothing: float) -> torch.Tensor:
        """The cross entropy summed by row, float32 ``[rows]``."""
        normed = self._forward(batch, None).normed
        losses, _ = self._losses(normed, batch, smoothing, gradient=False)
        return by_row(losses, batch.target_positions, batch.shape)

    @torch.no_grad()
    def add_gradients(self, batch: DeviceBatch, objective: Objective, tensors: Tensors) -> torch.Tensor:
        """The objective's result; its gradients by all that is trained are added to theirs."""
        forward = self._forward(batch, self._mode)
        factors = self._factors(forward.normed, batch, objective, tensors) if self._trains_head else None
        losses, dhidden = self._losses(forward.normed, batch, objective.smoothing, gradient=True, factors=factors)
        assert dhidden is not None
        result, grads = weigh(objective, losses, batch.target_positions, batch.shape, tensors)
        dhidden.mul_(grads if grads.dim() == 0 else grads[:, None])
        forward.normed.zero_().index_copy_(0, batch.target_positions, dhidden)
        del dhidden
        self._backward(batch, forward)
        return result

    @torch.no_grad()
    def hidden(self, batch: DeviceBatch, learns: bool) -> tuple[torch.Tensor, Forward | None]:
        """(the final norm's output ``[tokens, hidden]``, what `backward` needs of it where something is learnt)."""
        forward = self._forward(batch, self._mode if learns else None)
        return forward.normed[:-1], forward if learns else None

    @torch.no_grad()
    def backward(self, batch: DeviceBatch, forward: Forward, dhidden: torch.Tensor) -> None:
        """Adds the gradients, given that of `hidden`'s output, to those of what is trained below the head. The trained values
        must be those of the forward (`begin`), which can be used once."""
        self._weights.invalidate()
        forward.normed = dhidden  # the output's own memory is the caller's
        self._backward(batch, forward)

    def _backward(self, batch: DeviceBatch, forward: Forward) -> None:
        """From the gradient of the final norm's output, the first rows of `forward.normed`; uses the forward up."""
        (tokens, hidden), run = forward.x.shape, forward.run
        pad = max((pair.out_pad(run) for pair in self.pairs.values()), default=0)
        d = padded_rows(tokens, hidden, pad, forward.x)
        self._decoder.model.norm.backward(forward.normed[:tokens], forward.x, forward.rstd, None, d[:, :hidden])
        del forward.normed, forward.x
        layers = forward.layers
        for index in range(len(self._blocks) - 1, self._first - 1, -1):
            kept, layers[index] = layers[index], None
            assert kept is not None
            if forward.offload is not None:
                blocks.restore(kept, forward.offload.get(forward.away, index, self._first))
                forward.away[index] = None
            needs_dx = index > self._first or self._trains_embedding
            self._blocks[index].backward(d, kept, run, needs_dx)
            del kept
        if self._trains_embedding:
            self._decoder.model.embed_tokens.backward(d[:, :hidden], batch.input_ids.flatten())

    def _forward(self, batch: DeviceBatch, mode: str | None) -> Forward:
        decoder, layers, away = self._decoder, [], []
        self._weights.invalidate()
        run = Run(
            batch.tables,
            batch.layout.segments,
            dropout=batch.dropout,
            layout=batch.layout,
            weights=self._weights,
            pairs=self.pairs,
        )
        noise = None if batch.noise is None else batch.noise.flatten(0, 1)
        x, delta = decoder.model.embed_tokens(batch.input_ids.flatten(), noise), None
        for index, block in enumerate(self._blocks):
            x, delta, kept = block.forward_keeping(x, delta, run, mode if index >= self._first else None)
            if self._offload is not None:
                sent = None if kept is None else blocks.offloaded(kept, block.branches, self.pairs)
                away.append(None if sent is None else self._offload.put(sent))
                del sent
            layers.append(kept)
            del kept
        # One more row, which the filling of `target_positions` points at.
        normed = x.new_zeros(x.shape[0] + 1, x.shape[1])
        _, total, rstd = decoder.model.norm.forward_keeping(x, delta, normed=normed[:-1])
        return Forward(normed, total, rstd, layers, away, self._offload, run)

    def _losses(
        self,
        normed: torch.Tensor,
        batch: DeviceBatch,
        smoothing: float,
        gradient: bool,
        factors: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Head.losses_and_gradient`."""
        hidden = normed.index_select(0, batch.target_positions)
        return self._decoder.lm_head.losses_and_gradient(hidden, batch.targets, smoothing, gradient, factors)

    def _factors(self, normed: torch.Tensor, batch: DeviceBatch, objective: Objective, tensors: Tensors) -> torch.Tensor:
        """The gradient by every loss, known before the head's own gradient is formed."""
        if not isinstance(objective, RowObjective):
            return tensors["factor"]
        losses, _ = self._losses(normed, batch, objective.smoothing, gradient=False)
        return weigh(objective, losses, batch.target_positions, batch.shape, tensors)[1]
