"""RMSNorm, alone and fused with the sum of the residual stream that it reads."""

from __future__ import annotations

import torch
from torch import nn

from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.ops import Ops
from jaxsloth.torch_backend.run import padded_rows
from jaxsloth.torch_backend.weights import GetWeight, dense


class RMSNorm(nn.Module):
    """A frozen RMSNorm over the last axis."""

    def __init__(self, norm: specs.Norm, name: str, get_weight: GetWeight, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(dense(get_weight(f"{name}.weight")), requires_grad=False)
        self._eps, self._offset, self._ops = norm.eps, norm.weight_offset, ops
        self._kernel = ops.kernels.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self.weight, eps=self._eps, offset=self._offset)

    def forward_keeping(
        self, x: torch.Tensor, delta: torch.Tensor | None, pad: int = 0, normed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(the normed sum x + delta with `pad` columns behind its rows, the sum, the reciprocals).

        x and delta ``[rows, hidden]``. normed: the memory to write to, ``[rows, hidden]``.
        """
        total, hidden = x if delta is None else torch.empty_like(delta), x.shape[1]
        if normed is None:
            normed = padded_rows(x.shape[0], hidden, pad, x)
        target = normed[:, :hidden]
        rstd = self._kernel.add_norm(x, delta, self.weight, target, eps=self._eps, offset=self._offset, total=total)
        return normed, total, rstd

    def backward(
        self,
        dnormed: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        residual: torch.Tensor | None,
        dx: torch.Tensor,
    ) -> None:
        """Writes ``dx = residual + (the norm's gradient)``; x is what was normed, and dx may be residual."""
        self._kernel.add_norm_backward(dnormed, x, self.weight, rstd, residual, dx, offset=self._offset)
