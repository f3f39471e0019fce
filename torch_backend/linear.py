"""Linear layers: their frozen weight, dense or NF4, the adapter, and groups that share an input as one augmented product.

A group's weights and adapters are one matrix ``[[W, sB], [A, 0]]`` (kernels/lora_matmul/extended.py): LoRA's arithmetic, the
gradients of adapters and biases have their one place here; the product of few rows: few_rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn

from jaxsloth.kernels.dropout.contract import module_word
from jaxsloth.kernels.lora_dropout.contract import Masks
from jaxsloth.kernels.lora_matmul.contract import Dropout, pad_for
from jaxsloth.kernels.lora_matmul.extended import AdapterBlock
from jaxsloth.kernels.nf4.contract import MATVEC, NF4
from jaxsloth.kernels.registry import Op
from jaxsloth.kernels.torch_matmul import add_matmul_float32
from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.ops import Ops
from jaxsloth.torch_backend.run import Run
from jaxsloth.torch_backend.weights import GetWeight, dense

AdapterState = tuple[nn.Parameter | None, nn.Parameter | None, float, float]  # A, B, the scaling, the dropout rate


class Weight(Protocol):
    """A frozen weight ``[out, in]``, however it is stored."""

    kind: str  # weights of one kind may share a few-rows product
    quantized: bool
    matvec: Op | None  # the op that multiplies few rows with several weights of this kind

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def operand(self) -> Any:
        """The weight as ops take it."""
        ...

    def parts(self) -> Mapping[str, torch.Tensor]:
        """The stored tensors, by the names under which a module holds them."""
        ...

    def write(self, out: torch.Tensor, kernels: ModuleType) -> None:
        """Writes the weight to `out`, whose rows may lie apart. kernels: the module with `dequantize_into`."""
        ...

    def move_to(self, copy: torch.Tensor) -> None:
        """Takes a copy of the same values and type for its own memory, if it can, so that there is one of them."""
        ...

    def gather(self) -> Weight:
        """The whole weight, where this is a part of it."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """A `Weight` in the compute dtype."""

    value: nn.Parameter
    kind = "dense"
    quantized = False
    matvec = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape[0], self.value.shape[1]

    @property
    def operand(self) -> torch.Tensor:
        return self.value

    def parts(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.value}

    def write(self, out: torch.Tensor, kernels: ModuleType) -> None:
        del kernels
        out.copy_(self.value)

    def move_to(self, copy: torch.Tensor) -> None:
        self.value.data = copy

    def gather(self) -> DenseWeight:
        return self


@dataclass(frozen=True)
class Nf4Weight:
    """A `Weight` in bitsandbytes' NF4."""

    value: NF4
    quantized = True
    matvec = MATVEC

    @property
    def kind(self) -> str:
        return "nf4" if self.value.nested is None else "nested nf4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape

    @property
    def operand(self) -> NF4:
        return self.value

    def parts(self) -> Mapping[str, torch.Tensor]:
        found, nested = {"weight": self.value.codes, "weight_absmax": self.value.absmax}, self.value.nested
        if nested is None:
            return found
        own = {"absmax": nested.absmax, "offset": nested.offset, "code": nested.code}
        return found | {f"weight_nested_{name}": tensor for name, tensor in own.items()}

    def write(self, out: torch.Tensor, kernels: ModuleType) -> None:
        kernels.dequantize_into(self.value, out)

    def move_to(self, copy: torch.Tensor) -> None:
        del copy

    def gather(self) -> Nf4Weight:
        return self


class Linear(nn.Module):
    """A frozen linear layer with room for an adapter.

    base: its `Weight`; the module holds the weight's parts, `weight` among them.
    """

    def __init__(self, linear: specs.Linear, get_weight: GetWeight, ops: Ops) -> None:
        super().__init__()
        self.name = linear.name
        self.ops = ops
        value = get_weight(f"{linear.name}.weight")
        if isinstance(value, NF4):
            self.base = Nf4Weight(value)
            for name, tensor in self.base.parts().items():
                self.register_buffer(name, tensor)
        else:
            self.weight = nn.Parameter(value, requires_grad=False)
            self.base = DenseWeight(self.weight)
        self.bias = nn.Parameter(dense(get_weight(f"{linear.name}.bias")), requires_grad=False) if linear.bias else None
        self.lora_A: nn.Parameter | None
        self.lora_B: nn.Parameter | None
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self._scale, self._rate = 1.0, 0.0
        self._word = module_word(linear.name)

    def add_adapter(self, lora: specs.Lora, a: nn.Parameter, b: nn.Parameter) -> None:
        self.lora_A, self.lora_B = a, b
        self._scale, self._rate = lora.scale, lora.dropout

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.base.shape

    @property
    def word(self) -> int:
        """The layer's part of the key of its dropout masks."""
        return self._word

    @property
    def scale(self) -> float:
        """alpha / r of the adapter."""
        return self._scale

    @property
    def dropout(self) -> float:
        """The rate of LoRA dropout; 0 without an adapter."""
        return 0.0 if self.lora_A is None else self._rate

    def swap_adapter(self, adapter: AdapterState) -> AdapterState:
        """Takes another adapter, and hands back the one that it had."""
        # Every pass of a torch module does this to every layer: modules' attributes are set ten times slower.
        own, settings = self._parameters, self.__dict__
        before = (own["lora_A"], own["lora_B"], self._scale, self._rate)
        own["lora_A"], own["lora_B"], settings["_scale"], settings["_rate"] = adapter
        return before

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        dropout = None
        if self.dropout and run.dropout is not None:
            first, second = run.dropout.rng_key.unbind()
            dropout = Dropout(self._rate, torch.stack([first ^ self._word, second]), run.dropout.rows)
        return self.ops.lora_matmul(
            x, self.base.gather().operand, self.lora_A, self.lora_B, scale=self._scale, bias=self.bias, dropout=dropout
        )

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``x·Wᵀ`` without bias and adapter."""
        return self.ops.lora_matmul(x, self.base.gather().operand)


def make_linears(names: Sequence[specs.Linear], get_weight: GetWeight, ops: Ops) -> dict[str, Linear]:
    """Linear layers by the last part of their name."""
    return {linear.name.rpartition(".")[2]: Linear(linear, get_weight, ops) for linear in names}


class GroupLayout:
    """Where a group's adapters, as they are now, stand in its augmented weight, and the group's bias in the compute dtype."""

    def __init__(self, group: LinearGroup, dtype: torch.dtype) -> None:
        self._linears = group.linears
        ranks = [0 if linear.lora_A is None else linear.lora_A.shape[0] for linear in group.linears]
        self.ranks, self.places = tuple(ranks), tuple(sum(ranks[:place]) for place in range(len(ranks)))
        self.rank, self.pad = sum(ranks), pad_for(sum(ranks))
        # Of the dropout masks of the layers that have an adapter.
        words = [linear.word for linear in group.linears if linear.lora_A is not None]
        self.words = torch.tensor(words, dtype=torch.int64, device=group.linears[0].weight.device)
        self.bias, self._parts = None, []
        if any(linear.bias is not None for linear in group.linears):
            self.bias = torch.zeros(group.out_features, dtype=dtype, device=group.linears[0].weight.device)
            self._parts = list(self.bias.split(list(group.outs)))
        self.trains_biases = any(linear.bias is not None and linear.bias.requires_grad for linear in group.linears)
        self.take_biases(every=True)

    @torch.no_grad()
    def take_biases(self, every: bool = False) -> None:
        """Takes over the present values of biases that are trained, or of all."""
        for linear, part in zip(self._linears, self._parts, strict=False):
            if linear.bias is not None and (every or linear.bias.requires_grad):
                part.copy_(linear.bias)


class LinearGroup:
    """Linear layers that share their input, computed as one product each way."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = tuple(linears)
        self.in_features, self.outs = linears[0].shape[1], tuple(linear.shape[0] for linear in linears)
        self.out_features = sum(self.outs)
        self.starts = tuple(sum(self.outs[:place]) for place in range(len(linears)))
        self.quantized = any(linear.base.quantized for linear in linears)

    def written_refusal(self) -> str | None:
        """Why the written product can't serve the adapters as they are now: it serves all."""
        return None

    def forward(self, x: torch.Tensor, y: torch.Tensor, run: Run, first: int = 0) -> torch.Tensor | None:
        """``y = x·Wᵀ + bias`` and the adapters; returns ``x·Aᵀ [tokens, pad]``, or None where nothing is adapted.

        x ``[tokens, in]``, or ``[tokens, in + pad or more]`` whose columns past `in` are free to write. y ``[tokens, out]`` of
        any row stride. first: the token of the batch that x begins with, here and below.
        """
        weight, in_, xa = run.weight(self), self.in_features, None
        pad = weight.layout.pad
        if pad > 0:
            xa = x[:, in_ : in_ + pad] if x.shape[1] > in_ else x.new_empty(x.shape[0], pad)
            self._project(x, xa, run, first)
        weight.forward(x, xa, y)
        return xa

    def _project(self, x: torch.Tensor, xa: torch.Tensor, run: Run, first: int) -> torch.Tensor:
        """Writes ``x·Aᵀ`` to xa, behind the dropout where there is one."""
        weight = run.weight(self)
        masks = self._masks(weight.layout, run, first)
        if masks is None:
            return torch.mm(x[:, : self.in_features], weight.a.T, out=xa)
        return self._dropout.project(x, weight.a, masks, out=xa)

    @property
    def _dropout(self) -> ModuleType:
        return self.linears[0].ops.kernels.dropout

    def _masks(self, layout: GroupLayout, run: Run, first: int) -> Masks | None:
        """The masks of the adapted layers' input; None where nothing is dropped."""
        rate = max(linear.dropout for linear in self.linears)  # of all that have an adapter
        if run.dropout is None or rate == 0.0:
            return None
        ranks = tuple(rank for rank in layout.ranks if rank)
        length = run.segments.shape[1]
        return Masks(rate, run.dropout.rng_key, layout.words, ranks, run.dropout.rows, length, first)

    def backward_input(self, dy: torch.Tensor, dx: torch.Tensor | None, run: Run, first: int = 0) -> None:
        """Forms ``dy·sB`` behind dy's rows and writes dx where it is given.

        dy ``[tokens, out + pad or more]``, its columns past `out` free to write; dx ``[tokens, in]``.
        """
        weight, out = run.weight(self), self.out_features
        pad = weight.layout.pad
        if pad > 0:
            torch.mm(dy[:, :out], weight.b, out=dy[:, out : out + pad])
        if dx is None:
            return
        masks = self._masks(weight.layout, run, first)
        weight.backward(dy, dx, adapters=masks is None)
        if masks is not None:
            self._dropout.input_gradient(dx, dy[:, out : out + pad], weight.a, masks)

    def backward_adapters(self, dy: torch.Tensor, x: torch.Tensor, xa: torch.Tensor | None, run: Run, first: int = 0) -> None:
        """Adds the gradients of adapters and biases to theirs, after `backward_input`.

        x ``[tokens, in or more]``; xa is what `forward` returned, or None to form it again.
        """
        weight, in_, out = run.weight(self), self.in_features, self.out_features
        layout = weight.layout
        for start, linear in zip(self.starts, self.linears, strict=True):
            if linear.bias is not None and linear.bias.requires_grad:
                gradient_of(linear.bias).add_(dy[:, start : start + linear.shape[0]].sum(dim=0, dtype=torch.float32))
        if layout.pad == 0:
            return
        x, g = x[:, :in_], dy[:, out : out + layout.pad]
        if xa is None:
            xa = self._project(x, x.new_empty(x.shape[0], layout.pad), run, first)
        for place, linear in self.adapted():
            part = dy[:, self.starts[place] : self.starts[place] + self.outs[place]]
            own = xa[:, layout.places[place] : layout.places[place] + layout.ranks[place]]
            add_matmul_float32(gradient_of(linear.lora_B), part.T, own, scale=linear.scale)
        masks = self._masks(layout, run, first)
        if masks is None:
            self._add_gradients_of_a(g, x, layout)
        else:
            self._dropout.gradient_a(g, x, masks, [gradient_of(linear.lora_A) for _, linear in self.adapted()])

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        xa: torch.Tensor | None,
        dx: torch.Tensor | None,
        run: Run,
        first: int = 0,
    ) -> None:
        """`backward_input` and `backward_adapters`."""
        self.backward_input(dy, dx, run, first)
        self.backward_adapters(dy, x, xa, run, first)

    def pieces(self, matrix: torch.Tensor, layout: GroupLayout) -> list[AdapterBlock]:
        """The adapters' blocks of the augmented `matrix`: A below the weights, the scaled B beside them."""
        found, in_, out = [], self.in_features, self.out_features
        if layout.pad == 0:
            return found
        for place, linear in enumerate(self.linears):
            beside = matrix[self.starts[place] : self.starts[place] + self.outs[place], in_:]
            if linear.lora_A is None or linear.lora_B is None:
                found.append(AdapterBlock(None, beside))
                continue
            first = layout.places[place]
            found.append(AdapterBlock(linear.lora_A.data, matrix[out + first : out + first + layout.ranks[place], :in_]))
            found.append(AdapterBlock(linear.lora_B.data, beside, first, linear.scale))
        if layout.rank < layout.pad:
            found.append(AdapterBlock(None, matrix[out + layout.rank :, :in_]))
        return found

    def adapted(self) -> list[tuple[int, Linear]]:
        return [(place, linear) for place, linear in enumerate(self.linears) if linear.lora_A is not None]

    def _add_gradients_of_a(self, g: torch.Tensor, x: torch.Tensor, layout: GroupLayout) -> None:
        """dA of every layer, at once where their gradients lie one behind the other."""
        gradients = [gradient_of(linear.lora_A) for _, linear in self.adapted()]
        first, size = gradients[0], 0
        together = True
        for gradient in gradients:
            together &= gradient.data_ptr() == first.data_ptr() + size
            size += gradient.numel() * gradient.element_size()
        if together:
            whole = torch.as_strided(first, (layout.rank, self.in_features), (self.in_features, 1))
            add_matmul_float32(whole, g[:, : layout.rank].T, x)
            return
        for (place, _), gradient in zip(self.adapted(), gradients, strict=True):
            own = g[:, layout.places[place] : layout.places[place] + layout.ranks[place]]
            add_matmul_float32(gradient, own.T, x)


def gradient_of(parameter: nn.Parameter | None) -> torch.Tensor:
    assert parameter is not None and parameter.grad is not None
    return parameter.grad
