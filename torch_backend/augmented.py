"""The augmented weights of all groups in the compute dtype (`run.AugmentedWeights`), kept or rebuilt for each use."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from jaxsloth.torch_backend.linear import GroupLayout, LinearGroup


class ExactWeight:
    """A `run.AugmentedWeight` in the compute dtype. matrix: ``[out + pad, in + pad]``."""

    def __init__(self, group: LinearGroup, layout: GroupLayout, matrix: torch.Tensor) -> None:
        self._in, self._out, self.layout = group.in_features, group.out_features, layout
        self.a, self.b = matrix[self._out :, : self._in], matrix[: self._out, self._in :]
        self._matrix = matrix

    def forward(self, x: torch.Tensor, xa: torch.Tensor | None, y: torch.Tensor) -> None:
        beside, bias = xa is None or x.shape[1] > self._in, self.layout.bias
        width = self._in + self.layout.pad if beside else self._in
        x, weight = x[:, :width], self._matrix[: self._out, :width]
        if bias is None:
            torch.mm(x, weight.T, out=y)
        else:
            torch.addmm(bias, x, weight.T, out=y)
        if xa is not None and not beside:
            y.addmm_(xa, self.b.T)

    def backward(self, dy: torch.Tensor, dx: torch.Tensor, adapters: bool = True) -> None:
        height = self._out + self.layout.pad if adapters else self._out
        torch.mm(dy[:, :height], self._matrix[:height, : self._in], out=dx)


class ExactWeights:
    """Augmented matrices, kept for every group or rebuilt for each use in one shared buffer.

    kernels: the module with `AdapterCopy` and `dequantize_into`.
    """

    def __init__(
        self, groups: Sequence[LinearGroup], dtype: torch.dtype, device: torch.device, keeps: bool, kernels: ModuleType
    ) -> None:
        self._kernels = kernels
        self._layouts = {group: GroupLayout(group, dtype) for group in groups}
        self._shared = None
        self._matrices: dict[LinearGroup, ExactWeight] = {}
        sizes = [_height(group, layout) * _width(group, layout) for group, layout in self._layouts.items() if group.quantized]
        if sizes and not keeps:
            self._shared = torch.empty(max(sizes), dtype=dtype, device=device)
        pieces = []
        self._copies = {}
        like = torch.empty(0, dtype=dtype, device=device)
        for group, layout in self._layouts.items():
            if group.quantized and not keeps:
                matrix = self._view(group)
                self._copies[group] = kernels.AdapterCopy(group.pieces(matrix, layout), like)
            else:
                matrix = self._extend(group, layout, like)
                pieces.extend(group.pieces(matrix, layout))
            self._matrices[group] = ExactWeight(group, layout, matrix)
        self._kept = kernels.AdapterCopy(pieces, like)
        self._biased = [layout for layout in self._layouts.values() if layout.trains_biases]
        self._last: LinearGroup | None = None

    def _view(self, group: LinearGroup) -> torch.Tensor:
        assert self._shared is not None
        height, width = _height(group, self._layouts[group]), _width(group, self._layouts[group])
        return self._shared[: height * width].view(height, width)

    def _extend(self, group: LinearGroup, layout: GroupLayout, like: torch.Tensor) -> torch.Tensor:
        """A matrix of the group's own; a dense layer's weight moves into it, so that there is one copy."""
        matrix = like.new_zeros(_height(group, layout), _width(group, layout))
        self._fill(group, matrix)
        for start, linear in zip(group.starts, group.linears, strict=True):
            linear.base.move_to(matrix[start : start + linear.shape[0], : group.in_features])
        return matrix

    @torch.no_grad()
    def _fill(self, group: LinearGroup, matrix: torch.Tensor) -> None:
        for start, linear in zip(group.starts, group.linears, strict=True):
            part = matrix[start : start + linear.shape[0], : group.in_features]
            linear.base.gather().write(part, self._kernels)

    def begin(self) -> None:
        self._kept.run()
        for layout in self._biased:
            layout.take_biases()

    def invalidate(self) -> None:
        self._last = None

    def layout(self, group: LinearGroup) -> GroupLayout:
        return self._layouts[group]

    def of(self, group: LinearGroup) -> ExactWeight:
        if group in self._copies and self._last is not group:
            self._fill(group, self._view(group))
            self._copies[group].run()
            self._last = group
        return self._matrices[group]


def _height(group: LinearGroup, layout: GroupLayout) -> int:
    return group.out_features + layout.pad


def _width(group: LinearGroup, layout: GroupLayout) -> int:
    return group.in_features + layout.pad
