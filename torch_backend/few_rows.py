"""The product of few rows with a group of linear layers, as decoding takes it: the stored weights are read once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jaxsloth.kernels.registry import Target, select
from jaxsloth.torch_backend.linear import LinearGroup

WEIGHTS = 3  # that one nf4_matvec takes


class FewRows:
    """A group's product for few rows, with copies of its adapters in the compute dtype."""

    def __init__(self, group: LinearGroup, rows: int, dtype: torch.dtype, requested: str | None) -> None:
        self._group, self._dtype = group, dtype
        self._weights = [linear.base.gather() for linear in group.linears]
        self._matvec = self._choose(rows, requested)
        self._rank = sum(0 if linear.lora_A is None else linear.lora_A.shape[0] for linear in group.linears)
        device = group.linears[0].weight.device
        self._a = torch.zeros(self._rank, group.in_features, dtype=dtype, device=device)
        self._b = torch.zeros(self._rank, group.out_features, dtype=dtype, device=device)
        biased = any(linear.bias is not None for linear in group.linears)
        self._bias = torch.zeros(group.out_features, dtype=dtype, device=device) if biased else None

    def _choose(self, rows: int, requested: str | None) -> Callable[..., torch.Tensor] | None:
        """The matvec that takes these weights together, or None."""
        op = self._weights[0].matvec
        if op is None or len({weight.kind for weight in self._weights}) > 1 or len(self._weights) > WEIGHTS:
            return None
        values = max(weight.shape[0] * weight.shape[1] for weight in self._weights)
        sizes = {"rows": rows, "in": self._group.in_features, "values": values}
        platform, dtype = self._group.linears[0].weight.device.type, str(self._dtype).removeprefix("torch.")
        chosen = select(op, "torch", Target(platform, dtype, sizes), requested).implementation  # type: ignore[arg-type]
        # Where the kernel refuses on a GPU, dequantizing there and a product are the faster way.
        return None if chosen.name == "torch" and platform == "cuda" and requested is None else chosen.load()

    @torch.no_grad()
    def begin(self) -> None:
        """Takes over the present values of adapters and biases."""
        column = 0
        for start, linear in zip(self._group.starts, self._group.linears, strict=True):
            end = start + linear.shape[0]
            if linear.lora_A is not None and linear.lora_B is not None:
                rank = linear.lora_A.shape[0]
                self._a[column : column + rank] = linear.lora_A
                self._b[column : column + rank, start:end] = (linear.scale * linear.lora_B).T
                column += rank
            if linear.bias is not None and self._bias is not None:
                self._bias[start:end] = linear.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[rows, in] -> [rows, sum of out]``."""
        if self._matvec is not None:
            y = self._matvec(x, [weight.operand for weight in self._weights], self._bias)
        else:
            parts = [linear.multiply(x) for linear in self._group.linears]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if self._bias is not None:
                y = y.add_(self._bias)
        return y if self._rank == 0 else y.addmm_(x @ self._a.T, self._b)
