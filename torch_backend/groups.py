"""Linear layers that share their input, computed as one extended product each way (kernels/lora_matmul/extended.py)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch

from jaxsloth.kernels.lora_matmul import extended
from jaxsloth.kernels.lora_matmul.contract import room_for
from jaxsloth.kernels.lora_matmul.extended import Piece
from jaxsloth.kernels.nf4.contract import NF4
from jaxsloth.kernels.torch_matmul import add_matmul_float32
from jaxsloth.torch_backend.layers import Linear


class Group:
    """Linear layers with one input, and the layout of their extended matrix ``[out + room, in + room]``."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = tuple(linears)
        shapes = [linear.shape for linear in linears]
        self.in_features, self.outs = shapes[0][1], tuple(shape[0] for shape in shapes)
        self.out_features = sum(self.outs)
        self.starts = tuple(sum(self.outs[:place]) for place in range(len(linears)))
        ranks = [0 if linear.lora_A is None else linear.lora_A.shape[0] for linear in linears]
        self.ranks, self.places = tuple(ranks), tuple(sum(ranks[:place]) for place in range(len(ranks)))
        self.rank, self.room = sum(ranks), room_for(sum(ranks))
        self.bias = None
        if any(linear.bias is not None for linear in linears):
            biases = [one.bias for one in linears if one.bias is not None]
            zeros = [biases[0].new_zeros(out) for out in self.outs]
            self.bias = torch.cat([z if one.bias is None else one.bias for one, z in zip(linears, zeros, strict=True)]).detach()

    @property
    def values(self) -> int:
        """Elements of the extended matrix."""
        return (self.out_features + self.room) * (self.in_features + self.room)

    @property
    def quantized(self) -> bool:
        return any(isinstance(linear.base(), NF4) for linear in self.linears)

    def adapted(self) -> list[tuple[int, Linear]]:
        return [(place, linear) for place, linear in enumerate(self.linears) if linear.lora_A is not None]

    def pieces(self, matrix: torch.Tensor) -> list[Piece]:
        """What the margins of `matrix` hold: A below the weights, the scaled B beside them."""
        found, in_, out = [], self.in_features, self.out_features
        if self.room == 0:
            return found
        for place, linear in enumerate(self.linears):
            beside = matrix[self.starts[place] : self.starts[place] + self.outs[place], in_:]
            if linear.lora_A is None or linear.lora_B is None:
                found.append(Piece(None, beside))
                continue
            first = self.places[place]
            found.append(Piece(linear.lora_A.data, matrix[out + first : out + first + self.ranks[place], :in_]))
            found.append(Piece(linear.lora_B.data, beside, first, linear.scale))
        if self.rank < self.room:
            found.append(Piece(None, matrix[out + self.rank :, :in_]))
        return found


class Matrix(Protocol):
    """A group's frozen weights W and adapters. low_a ``[room, in]`` holds A and low_b ``[out, room]`` the scaled B."""

    low_a: torch.Tensor
    low_b: torch.Tensor

    def forward(self, x: torch.Tensor, low: torch.Tensor | None, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """``y = x·Wᵀ + low·(sB)ᵀ + bias``. x ``[tokens, in or more]``; low ``[tokens, room]`` (None where room is 0) lies
        behind the rows of x if those are longer than `in`."""
        ...

    def backward(self, dy: torch.Tensor, dx: torch.Tensor) -> None:
        """``dx = dy·W + (dy·sB)·A``. dy ``[tokens, out + room or more]`` with ``dy·sB`` behind its rows."""
        ...


class Weights(Protocol):
    """The matrices of a model."""

    def begin(self) -> None:
        """Takes over the adapters' values of this step."""
        ...

    def forget(self) -> None:
        """What a shared buffer holds is no longer counted on: adapters may have changed, or a graph is captured."""
        ...

    def of(self, group: Group) -> Matrix:
        """The group's matrix; what `of` gave before may be overwritten."""
        ...


class ExactMatrix:
    """A `Matrix` in the compute dtype. matrix: the extended one, ``[out + room, in + room]``."""

    def __init__(self, group: Group, matrix: torch.Tensor) -> None:
        self._in, self._out, self._room = group.in_features, group.out_features, group.room
        self.low_a, self.low_b = matrix[self._out :, : self._in], matrix[: self._out, self._in :]
        self._matrix = matrix

    def forward(self, x: torch.Tensor, low: torch.Tensor | None, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        beside = low is None or x.shape[1] > self._in
        width = self._in + self._room if beside else self._in
        x, weight = x[:, :width], self._matrix[: self._out, :width]
        if bias is None:
            torch.mm(x, weight.T, out=y)
        else:
            torch.addmm(bias, x, weight.T, out=y)
        if low is not None and not beside:
            y.addmm_(low, self.low_b.T)

    def backward(self, dy: torch.Tensor, dx: torch.Tensor) -> None:
        torch.mm(dy[:, : self._out + self._room], self._matrix[:, : self._in], out=dx)


class ExactWeights:
    """`Weights` in the compute dtype: extended matrices, kept for every group or rebuilt for each use in one shared buffer.

    kernels: the module with `Placement` and `dequantize_into`.
    """

    def __init__(
        self, groups: Sequence[Group], dtype: torch.dtype, device: torch.device, keeps: bool, kernels: ModuleType
    ) -> None:
        self._kernels = kernels
        quantized = [group for group in groups if group.quantized]
        self._shared = None
        self._matrices: dict[Group, ExactMatrix] = {}
        if quantized and not keeps:
            self._shared = torch.empty(max(group.values for group in quantized), dtype=dtype, device=device)
        pieces = []
        self._placements: dict[Group, extended.Placement] = {}
        like = torch.empty(0, dtype=dtype, device=device)
        for group in groups:
            if group.quantized and not keeps:
                assert self._shared is not None
                matrix = self._view(group)
                self._placements[group] = kernels.Placement(group.pieces(matrix), like)
            else:
                matrix = self._extend(group, dtype, device)
                pieces.extend(group.pieces(matrix))
            self._matrices[group] = ExactMatrix(group, matrix)
        self._kept = kernels.Placement(pieces, like)
        self._last: Group | None = None

    def _view(self, group: Group) -> torch.Tensor:
        assert self._shared is not None
        height, width = group.out_features + group.room, group.in_features + group.room
        return self._shared[: height * width].view(height, width)

    def _extend(self, group: Group, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A matrix of the group's own; a dense layer's weight moves into it, so that there is one copy."""
        matrix = torch.zeros(group.out_features + group.room, group.in_features + group.room, dtype=dtype, device=device)
        self._fill(group, matrix)
        for start, linear in zip(group.starts, group.linears, strict=True):
            if not isinstance(linear.base(), NF4):
                linear.weight.data = matrix[start : start + linear.shape[0], : group.in_features]
        return matrix

    @torch.no_grad()
    def _fill(self, group: Group, matrix: torch.Tensor) -> None:
        for start, linear in zip(group.starts, group.linears, strict=True):
            part, base = matrix[start : start + linear.shape[0], : group.in_features], linear.base()
            if isinstance(base, NF4):
                self._kernels.dequantize_into(base, part)
            else:
                part.copy_(base)

    def begin(self) -> None:
        self._kept.run()

    def forget(self) -> None:
        self._last = None

    def of(self, group: Group) -> Matrix:
        if group in self._placements and self._last is not group:
            self._fill(group, self._view(group))
            self._placements[group].run()
            self._last = group
        return self._matrices[group]


def forward(group: Group, matrix: Matrix, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """``y = x·Wᵀ + bias`` and the adapters; returns ``x·Aᵀ [tokens, room]``, or None where nothing is adapted.

    x ``[tokens, in]``, or ``[tokens, in + room or more]`` whose columns past `in` are free to write. y ``[tokens, out]`` of any
    row stride.
    """
    in_, room, low = group.in_features, group.room, None
    if room > 0:
        low = x[:, in_ : in_ + room] if x.shape[1] > in_ else x.new_empty(x.shape[0], room)
        torch.mm(x[:, :in_], matrix.low_a.T, out=low)
    matrix.forward(x, low, group.bias, y)
    return low


def backward_input(group: Group, matrix: Matrix, dy: torch.Tensor, dx: torch.Tensor | None) -> None:
    """Forms ``dy·sB`` behind dy's rows and writes dx where it is given.

    dy ``[tokens, out + room or more]``, its columns past `out` free to write; dx ``[tokens, in]``.
    """
    out, room = group.out_features, group.room
    if room > 0:
        torch.mm(dy[:, :out], matrix.low_b, out=dy[:, out : out + room])
    if dx is not None:
        matrix.backward(dy, dx)


def backward_adapters(group: Group, matrix: Matrix, dy: torch.Tensor, x: torch.Tensor, low: torch.Tensor | None) -> None:
    """Adds the adapters' gradients to theirs, after `backward_input`.

    x ``[tokens, in or more]``; low is what `forward` returned, or None to form it again.
    """
    in_, out, room = group.in_features, group.out_features, group.room
    if room == 0:
        return
    x, g = x[:, :in_], dy[:, out : out + room]
    if low is None:
        low = x @ matrix.low_a.T
    for place, linear in group.adapted():
        part = dy[:, group.starts[place] : group.starts[place] + group.outs[place]]
        mine = low[:, group.places[place] : group.places[place] + group.ranks[place]]
        add_matmul_float32(_gradient(linear.lora_B), part.T, mine, scale=linear.scale)
    _add_gradients_of_a(group, g, x)


def backward(
    group: Group,
    matrix: Matrix,
    dy: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor | None,
    dx: torch.Tensor | None,
) -> None:
    """`backward_input` and `backward_adapters`."""
    backward_input(group, matrix, dy, dx)
    backward_adapters(group, matrix, dy, x, low)


def _add_gradients_of_a(group: Group, g: torch.Tensor, x: torch.Tensor) -> None:
    """dA of every layer, at once where their gradients lie one behind the other."""
    gradients = [_gradient(linear.lora_A) for _, linear in group.adapted()]
    first, size = gradients[0], 0
    together = True
    for gradient in gradients:
        together &= gradient.data_ptr() == first.data_ptr() + size
        size += gradient.numel() * gradient.element_size()
    if together:
        whole = torch.as_strided(first, (group.rank, group.in_features), (group.in_features, 1))
        add_matmul_float32(whole, g[:, : group.rank].T, x)
        return
    for (place, _), gradient in zip(group.adapted(), gradients, strict=True):
        own = g[:, group.places[place] : group.places[place] + group.ranks[place]]
        add_matmul_float32(gradient, own.T, x)


def _gradient(parameter: torch.nn.Parameter | None) -> torch.Tensor:
    assert parameter is not None and parameter.grad is not None
    return parameter.grad
