"""The language-model head: logits, and the loss with its gradient formed in the forward."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from jaxsloth.kernels.linear_cross_entropy import torch_ops as loss_ops
from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.embedding import Embedding
from jaxsloth.torch_backend.linear import gradient_of
from jaxsloth.torch_backend.ops import Ops


class Head(nn.Module):
    """The head ``[vocab, hidden]``, frozen in the compute dtype or trained in float32, or the embedding's weight where tied.

    weight: None where it is tied to `embedding`.
    """

    def __init__(self, spec: specs.Head, weight: torch.Tensor | None, embedding: Embedding, ops: Ops) -> None:
        super().__init__()
        if weight is not None:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self._tied = (embedding,) if weight is None else ()  # in a tuple it is no submodule
        self._cap, self._ops = spec.soft_cap, ops

    @property
    def table(self) -> nn.Parameter:
        return self._tied[0].weight if self._tied else self.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 ``[..., vocab]``."""
        logits = nn.functional.linear(hidden, self.table.to(hidden.dtype)).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, per_token: bool, smoothing: float) -> torch.Tensor:
        """The cross-entropy of hidden states ``[n, hidden]``, summed or each; differentiable."""
        return self._ops.linear_cross_entropy(
            hidden,
            self.table.to(hidden.dtype),
            targets,
            soft_cap=self._cap,
            per_token=per_token,
            label_smoothing=smoothing,
        )

    @torch.no_grad()
    def losses_and_gradient(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
        gradient: bool,
        factors: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the loss of every target, the gradient of each by its own hidden state, where `gradient` asks for it).

        factors: the gradient by every loss, float32 ``[n]`` or a scalar: adds the head's own gradient.
        """
        table = self.table
        chunk = loss_ops.default_chunk(hidden.shape[0], table.shape[0])
        softmax = partial(self._ops.kernels.loss.softmax, label_smoothing=smoothing)
        each = None if factors is None else factors.expand(hidden.shape[0])
        wants = gradient, each is not None
        losses, dhidden, dweight = loss_ops.losses_and_gradients(
            hidden, table, targets, self._cap, -100, chunk, wants, softmax, each
        )
        if dweight is not None:
            gradient_of(table).add_(dweight)
        return losses, dhidden
