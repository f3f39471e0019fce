"""The token embedding, its scale, and the noise that a training step may add."""

from __future__ import annotations

import torch
from torch import nn

from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.linear import gradient_of


class Embedding(nn.Module):
    """The token table, frozen in the compute dtype, or trained in float32. dtype: of its output."""

    def __init__(self, spec: specs.Embedding, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._dtype = dtype
        # Rounded to the compute dtype, as transformers does; a number of the host, which a CUDA graph may hold.
        self._scale = float(torch.tensor(spec.scale, dtype=dtype))

    def forward(self, input_ids: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """``[..., hidden]``. noise: what is added, float32 of the same shape."""
        x = nn.functional.embedding(input_ids, self.weight).to(self._dtype)
        if self._scale != 1.0:
            x = x * self._scale
        return x if noise is None else x + noise.to(self._dtype)

    @torch.no_grad()
    def backward(self, dx: torch.Tensor, input_ids: torch.Tensor) -> None:
        """Adds the table's gradient, given that of the output ``[tokens, hidden]``."""
        if self._scale != 1.0:
            dx = dx * self._scale
        rows = self.weight.shape[0]
        own = torch.ops.aten.embedding_dense_backward(dx.to(self.weight.dtype), input_ids, rows, -1, False)
        gradient_of(self.weight).add_(own)
