"""The frozen products of training in 8 bits (``compute: fp8``): augmented weights in e4m3 with a scale a row.

Both directions are one product as in kernels/lora_matmul/extended.py, ``[x, x·Aᵀ] · [W, sB]ᵀ`` and ``[dy, dy·sB] · [Wᵀ, Aᵀ]ᵀ``;
the tensor cores want both operands contiguous along the summed axis, so the second matrix is stored transposed. Activations
get a scale a token, weights one an output feature, and in the backward one an input feature.

The scales of weights come from W alone and stay: so W is quantized once where its copies are kept, and adapters never cost
its precision. Where an adapter's values go beyond what a row's scale reaches, its blocks are divided by a power of two,
exactly, and the activations' pad is multiplied by it (`AdapterBlock.factor`). ``x·Aᵀ``, ``dy·sB`` and the adapters' gradients
are formed in the compute dtype, from activations that are not quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from jaxsloth.backend import BuildOptions
from jaxsloth.kernels.fp8 import library_ops, torch_ops
from jaxsloth.kernels.fp8.contract import LARGEST, SMALLEST, WIDTH, AdapterBlock, Rows
from jaxsloth.kernels.lora_matmul import extended
from jaxsloth.kernels.nf4.contract import BLOCK
from jaxsloth.kernels.registry import RefusedError, way_asked_for
from jaxsloth.torch_backend.linear import GroupLayout, Linear, LinearGroup

# A row's scale is at least that of a row whose maximum is this part of the matrix': a row of almost nothing must not make the
# factor of all margins large. Such a row's values still keep their relative precision down to 2^-11 of its own maximum.
FLOOR = 1 / 16
CAPABILITY = (8, 9)  # the first with products of e4m3


class Side:
    """The matrix of one direction: e4m3 ``[height, width]``, `extent` columns of weights and pad columns behind."""

    def __init__(
        self, group: LinearGroup, layout: GroupLayout, transposed: bool, peaks: torch.Tensor, factor: torch.Tensor
    ) -> None:
        """peaks float32 ``[height]``: the weights' maxima a row; factor: see `AdapterBlock`."""
        self.group, self.layout, self.transposed, self.factor = group, layout, transposed, factor
        features = group.in_features, group.out_features
        self.height, self.extent = features if transposed else features[::-1]
        self.width = self.extent + layout.pad
        peaks = torch.maximum(peaks, peaks.max() * FLOOR).clamp(min=SMALLEST)
        self.scales, self.inverse = (peaks / LARGEST)[:, None], LARGEST / peaks

    def part(self, matrix: torch.Tensor, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(where the weight of the group's layer at `place` lies, its rows' reciprocal scales)."""
        rows = slice(self.group.starts[place], self.group.starts[place] + self.group.outs[place])
        if self.transposed:
            return matrix[:, rows], self.inverse
        return matrix[rows, : self.extent], self.inverse[rows]

    def pieces(self, matrix: torch.Tensor) -> list[AdapterBlock]:
        """The adapters' columns behind the weights: the scaled B, or Aᵀ."""
        group, layout, margin, found = self.group, self.layout, matrix[:, self.extent :], []
        if layout.pad == 0:
            return found
        for place, linear in enumerate(group.linears):
            first, rows = layout.places[place], slice(group.starts[place], group.starts[place] + group.outs[place])
            if self.transposed and linear.lora_A is not None:
                target = margin[:, first : first + layout.ranks[place]]
                found.append(AdapterBlock(linear.lora_A.data.T, target, self.inverse, self.factor))
            elif not self.transposed:
                b = None if linear.lora_B is None else linear.lora_B.data
                found.append(AdapterBlock(b, margin[rows], self.inverse[rows], self.factor, first, linear.scale))
        if self.transposed and layout.rank < layout.pad:
            found.append(AdapterBlock(None, margin[:, layout.rank :], self.inverse, self.factor))
        return found


class Fp8Weight:
    """See `run.AugmentedWeight`."""

    def __init__(self, weights: Fp8Weights, a: torch.Tensor, b: torch.Tensor, sides: tuple[Side, Side]) -> None:
        self._weights, self.a, self.b = weights, a, b
        self._forward, self._backward = sides
        self.layout = self._forward.layout

    def forward(self, x: torch.Tensor, xa: torch.Tensor | None, y: torch.Tensor) -> None:
        self._weights.multiply(self._forward, x[:, : self._forward.extent], xa, self.layout.bias, y)

    def backward(self, dy: torch.Tensor, dx: torch.Tensor, adapters: bool = True) -> None:
        side = self._backward
        behind = dy[:, side.extent : side.width] if side.width > side.extent else None
        if behind is not None and not adapters:
            behind = torch.zeros_like(behind, memory_format=torch.contiguous_format)
        self._weights.multiply(side, dy[:, : side.extent], behind, None, dx)


class Fp8Weights:
    """Augmented weights in 8 bits. A dense group's two matrices are kept beside its weights (2 bytes a value more); those of a
    quantized one are kept too, or written anew for each use in a shared buffer.

    dense_kernels: the module with `AdapterCopy` and `dequantize_into`.
    """

    def __init__(
        self, groups: Sequence[LinearGroup], dtype: torch.dtype, device: torch.device, keeps: bool, dense_kernels: ModuleType
    ) -> None:
        self._kernels, self._product, self._dense = kernels_of(device), product_of(device), dense_kernels
        self._factors = torch.ones(2 * len(groups), device=device)
        like = torch.empty(0, dtype=torch_ops.E4M3, device=device)
        self._layouts = {group: GroupLayout(group, dtype) for group in groups}
        sides = {group: self._sides(group, place, dtype, device) for place, group in enumerate(groups)}
        shared = [side for group in groups if group.quantized and not keeps for side in sides[group]]
        self._shared = like.new_empty(max((side.height * side.width for side in shared), default=0))
        self._values: dict[Side, torch.Tensor] = {}
        self._adapter_copies = {}
        every, kept, exact = [], [], []
        self._matrices: dict[LinearGroup, Fp8Weight] = {}
        for group in groups:
            for side in sides[group]:
                lasts = not group.quantized or keeps
                size = side.height * side.width
                values = (like.new_empty(size) if lasts else self._shared[:size]).view(side.height, side.width)
                self._values[side], pieces = values, side.pieces(values)
                every.extend(pieces)
                if lasts:
                    self._fill(side)
                    kept.extend(pieces)
                else:
                    self._adapter_copies[side] = self._kernels.AdapterCopy(pieces, like)
            layout = self._layouts[group]
            a = torch.zeros(layout.pad, group.in_features, dtype=dtype, device=device)
            b = torch.zeros(group.out_features, layout.pad, dtype=dtype, device=device)
            exact.extend(_exact_pieces(group, layout, a, b))
            self._matrices[group] = Fp8Weight(self, a, b, sides[group])
        self._every, self._kept = self._kernels.AdapterCopy(every, like), self._kernels.AdapterCopy(kept, like)
        self._exact = dense_kernels.AdapterCopy(exact, torch.empty(0, dtype=dtype, device=device))
        self._biased = [layout for layout in self._layouts.values() if layout.trains_biases]
        self._last: Side | None = None

    @torch.no_grad()
    def _sides(self, group: LinearGroup, place: int, dtype: torch.dtype, device: torch.device) -> tuple[Side, Side]:
        """(forward, backward), their scales set from the weights."""
        rows, columns = [], torch.zeros(group.in_features, device=device)
        for linear in group.linears:
            weight = linear.weight
            if linear.base.quantized:
                weight = torch.empty(linear.shape, dtype=dtype, device=device)
                linear.base.write(weight, self._dense)
            rows.append(_peaks(weight, 1))
            columns = torch.maximum(columns, _peaks(weight, 0))
        factors = self._factors[2 * place : 2 * place + 2].split(1)
        layout = self._layouts[group]
        return Side(group, layout, False, torch.cat(rows), factors[0]), Side(group, layout, True, columns, factors[1])

    def _fill(self, side: Side) -> None:
        for place, linear in enumerate(side.group.linears):
            target, inverse = side.part(self._values[side], place)
            write = self._kernels.nf4_into if linear.base.quantized else self._kernels.dense_into
            write(linear.base.operand, inverse, target, transposed=side.transposed)

    def begin(self) -> None:
        self._exact.run()
        self._every.reach(self._factors)
        self._kept.run()
        for layout in self._biased:
            layout.take_biases()

    def invalidate(self) -> None:
        self._last = None

    def layout(self, group: LinearGroup) -> GroupLayout:
        return self._layouts[group]

    def of(self, group: LinearGroup) -> Fp8Weight:
        return self._matrices[group]

    def multiply(
        self, side: Side, x: torch.Tensor, behind: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """``out [tokens, height] = [x, behind] · matrixᵀ + bias``; x ``[tokens, extent]``, behind ``[tokens, pad]``."""
        if side in self._adapter_copies and self._last is not side:
            self._fill(side)
            self._adapter_copies[side].run()
            self._last = side
        rows = self._kernels.quantize_rows(x, behind, side.factor)
        self._product.scaled_product(rows, Rows(self._values[side], side.scales), bias, out)


def kernels_of(device: torch.device) -> ModuleType:
    """The module with `quantize_rows`, `nf4_into`, `dense_into` and `AdapterCopy` for this device."""
    if device.type != "cuda":
        return torch_ops
    from jaxsloth.kernels.fp8 import triton_kernel

    return triton_kernel


def product_of(device: torch.device) -> ModuleType:
    return library_ops if device.type == "cuda" else torch_ops


def check_options(options: BuildOptions, device: torch.device) -> None:
    """RefusedError where ``compute: fp8`` is asked for and can't run with these options on this device."""
    if options.compute == "exact":
        return
    reason, requested = None, way_asked_for("train_pass", (options.implementations or {}).get("train_pass"))
    if options.dtype != "bfloat16":
        reason = f"needs dtype bfloat16; got {options.dtype}"
    elif requested == "autograd":
        reason = "is formed by the training pass 'written', and 'autograd' was asked for"
    elif device.type != "cuda":
        if requested != "written":
            reason = "needs an NVIDIA GPU (elsewhere it is emulated where the training pass 'written' is asked for by name)"
    elif torch.cuda.get_device_capability(device) < CAPABILITY:
        has = ".".join(map(str, torch.cuda.get_device_capability(device)))
        reason = f"needs an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or later, and this one has {has}"
    if reason is not None:
        raise RefusedError(f"compute fp8 can't run here: it {reason}; set compute: exact")


def layer_refusal(linears: Sequence[Linear]) -> str | None:
    """Why these layers' products can't be formed in 8 bits, or None."""
    for linear in linears:
        if linear.shape[0] % WIDTH or linear.shape[1] % WIDTH:
            return f"needs widths that are multiples of {WIDTH}, and a linear layer has {linear.shape}"
        if linear.base.quantized and linear.shape[1] % BLOCK:
            return f"needs NF4 weights whose rows are whole blocks of {BLOCK} values, and one has the shape {linear.shape}"
    return None


def _exact_pieces(group: LinearGroup, layout: GroupLayout, a: torch.Tensor, b: torch.Tensor) -> list[extended.AdapterBlock]:
    """The adapters in the compute dtype; what stays zero is no piece."""
    found = []
    for place, linear in group.adapted():
        assert linear.lora_A is not None and linear.lora_B is not None
        first, start = layout.places[place], group.starts[place]
        found.append(extended.AdapterBlock(linear.lora_A.data, a[first : first + layout.ranks[place]]))
        found.append(extended.AdapterBlock(linear.lora_B.data, b[start : start + group.outs[place]], first, linear.scale))
    return found


def _peaks(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """float32: the maximum of the absolute values along `dim`."""
    lowest, highest = torch.aminmax(weight, dim=dim)
    return torch.maximum(highest, -lowest).float()
