"""Linear layers: their weights, dense or NF4, their adapters, and groups of them that share an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.run import Run
from jaxsloth.kernels.dropout.contract import module_word
from jaxsloth.kernels.jax_platform import platform, precision_of
from jaxsloth.kernels.lora_dropout.contract import Masks
from jaxsloth.kernels.lora_matmul import pallas_kernel as augmented
from jaxsloth.kernels.lora_matmul.contract import Dropout, pad_for
from jaxsloth.kernels.nf4.contract import DEQUANTIZE, Nested
from jaxsloth.kernels.nf4.xla_ops import NF4, select_layer  # from here, since this module makes it a pytree
from jaxsloth.kernels.registry import Target, resolve
from jaxsloth.models import spec as specs
from jaxsloth.models.names import layer_linears

GetArray = Callable[[str], Any]


class Frozen(nnx.Variable):
    """A base weight in the compute dtype."""


class Quantized(nnx.Variable):
    """Part of a base weight in NF4."""


class AdapterVariable(nnx.Variable):
    """A LoRA weight, float32, trained."""


class Trained(nnx.Variable):
    """A bias or a whole module that is trained, float32."""


TRAINED = (AdapterVariable, Trained)
PRODUCT = "product"  # what autograd's recomputation calls the output of a linear layer


class Weight(Protocol):
    """A frozen weight ``[out, in]``, or a stack of them ``[layers, out, in]``, however it is stored."""

    variable: type[nnx.Variable]

    @property
    def kind(self) -> str:
        """Weights of one kind can be read by one kernel call."""
        ...

    def parts(self) -> dict[str, Any]:
        """The arrays that it is stored in, by name."""
        ...

    def gather(self) -> Any:
        """The whole weight as the kernels take it."""
        ...

    def at(self, layer: int) -> Weight:
        """One weight of the stack."""
        ...

    def dense(self, dtype: Any) -> Any:
        """The values."""
        ...

    def matvec(self, ops: Ops, rows: int, shape: tuple[int, int]) -> Callable[..., Any] | None:
        """``f(x, gathered weights, layer=)`` for so many rows and weights of at most this shape, which reads the stored arrays
        once; None where nothing is better than the plain product."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """Values in the compute dtype."""

    array: Any
    variable = Frozen
    kind = "dense"

    def parts(self) -> dict[str, Any]:
        return {"weight": self.array}

    @staticmethod
    def from_parts(parts: Mapping[str, Any], shape: tuple[int, int]) -> DenseWeight:
        del shape
        return DenseWeight(parts["weight"])

    def gather(self) -> Any:
        return self.array

    def at(self, layer: int) -> DenseWeight:
        return DenseWeight(self.array[layer])

    def dense(self, dtype: Any) -> Any:
        return self.array.astype(dtype)

    def matvec(self, ops: Ops, rows: int, shape: tuple[int, int]) -> None:
        del ops, rows, shape


@dataclass(frozen=True)
class Nf4Weight:
    """Values in NF4."""

    array: NF4
    variable = Quantized

    @property
    def kind(self) -> str:
        return "nf4" if self.array.nested is None else "nested nf4"

    def parts(self) -> dict[str, Any]:
        found, nested = {"weight": self.array.codes, "weight_absmax": self.array.absmax}, self.array.nested
        if nested is not None:
            found |= {f"weight_nested_{name}": getattr(nested, name) for name in ("absmax", "offset", "code")}
        return found

    @staticmethod
    def from_parts(parts: Mapping[str, Any], shape: tuple[int, int]) -> Nf4Weight:
        nested = None
        if "weight_nested_absmax" in parts:
            nested = Nested(*(parts[f"weight_nested_{name}"] for name in ("absmax", "offset", "code")))
        return Nf4Weight(NF4(parts["weight"], parts["weight_absmax"], nested, shape))

    def gather(self) -> Any:
        return self.array

    def at(self, layer: int) -> Nf4Weight:
        return Nf4Weight(select_layer(self.array, jnp.int32(layer)))

    def dense(self, dtype: Any) -> Any:
        return resolve(DEQUANTIZE, "jax", Target(platform()))(self.array, dtype)

    def matvec(self, ops: Ops, rows: int, shape: tuple[int, int]) -> Callable[..., Any] | None:
        return ops.matvec(rows, shape)


def as_weight(value: Any) -> DenseWeight | Nf4Weight:
    """A base weight as it was loaded, behind the protocol."""
    return Nf4Weight(value) if isinstance(value, NF4) else DenseWeight(value)


@dataclass(frozen=True)
class Place:
    """A stack of blocks: the index of its first one, and the distance from one to the next."""

    spec: specs.ModelSpec
    index: int
    period: int

    def names_of(self, linear: specs.Linear) -> tuple[str, ...]:
        """A linear layer's name in every block of the stack."""
        tail = linear.name.split(".", 3)[3]
        return tuple(f"model.layers.{i}.{tail}" for i in range(self.index, len(self.spec.layers), self.period))

    def linears(self, part: str) -> dict[str, specs.Linear]:
        """The linear layers of one body by their last names."""
        found = {}
        for linear in layer_linears(self.spec, self.index):
            owner, _, name = linear.name.rpartition(".")
            if owner.endswith(f".{part}"):
                found[name] = linear
        return found


class Linear(nnx.Module):
    """A frozen linear layer with or without an adapter; all arrays stacked ``[layers, …]``.

    `weight` is the dense weight ``[layers, out, in]`` or, where the base is quantized, its NF4 codes. names: the layer's
    Hugging Face name in each of the stacked blocks.
    """

    def __init__(self, linear: specs.Linear, names: tuple[str, ...], lora: specs.Lora | None, get: GetArray, ops: Ops) -> None:
        self._ops = ops
        self.shape = (linear.out_features, linear.in_features)
        weight = as_weight(get(f"{linear.name}.weight"))
        self._kind, self._parts = type(weight), tuple(weight.parts())
        for name, part in weight.parts().items():
            setattr(self, name, weight.variable(part))
        self.biased = linear.bias
        if linear.bias:
            bias = get(f"{linear.name}.bias")
            self.bias = bias if isinstance(bias, Trained) else Frozen(bias)
        # Where only some blocks of the stack have an adapter, the others' are zero, and gradients keep them so.
        self.adapted = lora is not None and any(name in lora.modules for name in names)
        self.scale, self.dropout = 1.0, 0.0
        if lora is not None and self.adapted:
            self.lora_A = AdapterVariable(get(f"{linear.name}.lora_A"))
            self.lora_B = AdapterVariable(get(f"{linear.name}.lora_B"))
            self.scale, self.dropout = lora.scale, lora.dropout
            self._words = tuple(module_word(name) for name in names)

    @property
    def rank(self) -> int:
        """Of the adapter that is here now: those that someone else owns may have ranks of their own."""
        return self.lora_A[...].shape[-2] if self.adapted else 0

    def base(self) -> DenseWeight | Nf4Weight:
        """The frozen weights, stacked."""
        return self._kind.from_parts({name: getattr(self, name)[...] for name in self._parts}, self.shape)

    def bias_at(self, layer: Any) -> Any:
        """``[out]``, or None."""
        if not self.biased:
            return None
        # What is trained arrives sliced.
        return self.bias[...] if isinstance(self.bias, Trained) else self.bias[...][layer]

    @property
    def trains_bias(self) -> bool:
        return self.biased and isinstance(self.bias, Trained)

    def forward(self, x: Any, run: Run) -> Any:
        """``[batch, length, in] -> [batch, length, out]``."""
        bias = self.bias_at(run.layer)
        if run.decoding:
            matvec = self.base().matvec(self._ops, x.shape[0] * x.shape[1], self.shape)
            if matvec is not None:
                return self._decode(matvec, x, bias, run.layer)
        adapter = {}
        if self.adapted:
            adapter = {"scale": self.scale, "dropout": self._dropout(run)}
            adapter |= {"lora_a": self.lora_A[...], "lora_b": self.lora_B[...]}
        y = self._ops.lora_matmul(x, self.base().gather(), bias=bias, layer=run.layer, **adapter)
        return checkpoint_name(y, PRODUCT)

    def word(self, layer: Any) -> Any:
        """The part of the key of the dropout masks that is this layer's own."""
        return jnp.array(self._words, jnp.uint32)[layer]

    def _dropout(self, run: Run) -> Dropout | None:
        if not self.dropout or run.dropout is None:
            return None
        word = self.word(run.layer)
        key = jnp.stack([run.dropout.rng_key[0] ^ word, run.dropout.rng_key[1]])
        return Dropout(self.dropout, key, run.dropout.rows)

    def _decode(self, matvec: Callable[..., Any], x: Any, bias: Any, layer: Any) -> Any:
        """As `lora_matmul`, without writing the dequantized weight."""
        flat = x.reshape(-1, x.shape[-1])
        y = matvec(flat, [self.base().gather()], layer=layer)
        if self.adapted:
            a, b = self.lora_A[...].astype(x.dtype), (self.scale * self.lora_B[...]).astype(x.dtype)
            precision = precision_of(x.dtype)
            xa = jnp.einsum("ti,ri->tr", flat, a, precision=precision)
            y = y + jnp.einsum("tr,or->to", xa, b, precision=precision)
        if bias is not None:
            y = y + bias.astype(y.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def add_linears(module: nnx.Module, place: Place, part: str, get: GetArray, ops: Ops) -> None:
    """Give a body its linear layers under their names."""
    for name, linear in place.linears(part).items():
        setattr(module, name, Linear(linear, place.names_of(linear), place.spec.lora, get, ops))


class LinearGroup:
    """Linear layers that share their input: one product each way, with their adapters as extra columns.

    Arrays called padded have `pad` columns behind their rows, which hold nothing until a product with A or B is written there
    (kernels/lora_matmul/pallas_kernel.py). Made anew for every use: it keeps what it has formed of the adapters.

    least_pad: of arrays that several groups take, as the stream's gradient.
    """

    def __init__(self, module: nnx.Module, names: Sequence[str], least_pad: int = 0) -> None:
        self.linears: dict[str, Linear] = {name: getattr(module, name) for name in names}
        one, *_ = linears = tuple(self.linears.values())
        self.in_features, self._ops = one.shape[1], one._ops
        self.rank = sum(linear.rank for linear in linears)
        self.pad = max(pad_for(self.rank), least_pad)
        self._layout = augmented.GroupLayout(
            self.in_features,
            tuple(linear.shape[0] for linear in linears),
            tuple(linear.rank for linear in linears),
            tuple(linear.scale for linear in linears),
            self.pad,
            platform() != "cuda",
        )
        self._packed: Any = None

    @property
    def out_features(self) -> int:
        return self._layout.out_features

    def written_refusal(self) -> str | None:
        """Why the products below can't stand for `Linear.forward`, or None."""
        asked = self._ops.asked_otherwise("lora_matmul", "nf4_dequantize")
        return asked or augmented.refuses(self.in_features, self.rank)

    def _adapters(self, dtype: Any) -> Any:
        if self._packed is None:
            pairs = [(one.lora_A[...], one.lora_B[...]) if one.adapted else None for one in self.linears.values()]
            self._packed = augmented.pack_adapters(self._layout, pairs, dtype)
        return self._packed

    def _bases(self) -> tuple[Any, ...]:
        return tuple(linear.base().gather() for linear in self.linears.values())

    def _bias(self, run: Run, dtype: Any) -> Any:
        linears = self.linears.values()
        if not any(linear.biased for linear in linears):
            return None
        parts = [one.bias_at(run.layer) if one.biased else jnp.zeros(one.shape[0], dtype) for one in linears]
        return jnp.concatenate([part.astype(dtype) for part in parts])

    def _masks(self, run: Run, first: int) -> Masks | None:
        """The masks of the adapted layers' input, which begins at token `first` of the batch; None where nothing is dropped."""
        adapted = [one for one in self.linears.values() if one.adapted]
        if run.dropout is None or not adapted or not adapted[0].dropout:
            return None
        words = jnp.stack([one.word(run.layer) for one in adapted])
        ranks, length = tuple(one.rank for one in adapted), run.segments.shape[1]
        return Masks(adapted[0].dropout, run.dropout.rng_key, words, ranks, run.dropout.rows, length, first)

    def forward(self, x: Any, run: Run, xa: Any = None, first: int = 0) -> tuple[Any, Any, Any]:
        """(y ``[tokens, out]``; ``x·Aᵀ [tokens, pad]``, None without a pad; x with that behind its rows) from x, padded.

        xa: ``x·Aᵀ`` where it is known. first: the token of the batch that x begins with, here and below.
        """
        bias, masks = self._bias(run, x.dtype), self._masks(run, first)
        return augmented.forward(self._layout, x, self._bases(), self._adapters(x.dtype), bias, run.layer, xa, masks)

    def backward_input(self, dy: Any, run: Run, first: int = 0) -> tuple[Any, Any]:
        """(dx ``[tokens, in]``, dy with ``dy·sB`` behind its rows) from dy, padded."""
        masks = self._masks(run, first)
        return augmented.backward(self._layout, dy, self._bases(), self._adapters(dy.dtype), run.layer, masks)

    def backward_adapters(self, x: Any, xa: Any, dy: Any, run: Run, first: int = 0) -> dict[str, Any]:
        """The gradients of what is trained, float32, by name; xa and dy as `forward` and `backward_input` returned them."""
        pairs, found, column = augmented.gradients(self._layout, x, xa, dy, self._masks(run, first)), {}, 0
        for (name, linear), pair in zip(self.linears.items(), pairs, strict=True):
            if linear.adapted:
                found |= {f"{name}.lora_A": pair[0], f"{name}.lora_B": pair[1]}
            if linear.trains_bias:
                found[f"{name}.bias"] = dy[:, column : column + linear.shape[0]].astype(jnp.float32).sum(axis=0)
            column += linear.shape[0]
        return found

    def packed(self, dtype: Any) -> tuple[Any, Any] | None:
        """(A ``[layers, r, in]``, B times its scale ``[layers, r, out]``) of all layers of the group in one, or None."""
        linears = tuple(self.linears.values())
        adapted = [one for one in linears if one.adapted]
        if not adapted:
            return None
        b, column = [], 0
        for one in linears:
            if one.adapted:
                own = (one.scale * one.lora_B[...]).astype(dtype).swapaxes(1, 2)
                b.append(jnp.pad(own, ((0, 0), (0, 0), (column, self.out_features - column - one.shape[0]))))
            column += one.shape[0]
        return jnp.concatenate([one.lora_A[...].astype(dtype) for one in adapted], axis=1), jnp.concatenate(b, axis=1)

    def step(self, x: Any, packed: tuple[Any, Any] | None, run: Run) -> Any:
        """``[rows, in] -> [rows, sum of out]`` for few rows; packed: this block's part of what `packed` made."""
        linears, layer = tuple(self.linears.values()), run.layer
        weights = [one.base() for one in linears]
        matvec = None
        if len({weight.kind for weight in weights}) == 1:
            matvec = weights[0].matvec(self._ops, x.shape[0], (max(one.shape[0] for one in linears), x.shape[1]))
        if matvec is not None:
            y = matvec(x, [weight.gather() for weight in weights], layer=layer)
        else:
            parts = [self._ops.lora_matmul(x, weight.gather(), layer=layer) for weight in weights]
            y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        if packed is not None:
            a, b = packed
            precision = precision_of(x.dtype)
            xa = jnp.einsum("ti,ri->tr", x, a, precision=precision)
            y = y + jnp.einsum("tr,ro->to", xa, b, precision=precision)
        bias = self._bias(run, y.dtype)
        return y if bias is None else y + bias


def pad_columns(x: Any, pad: int) -> Any:
    """x with `pad` free columns behind its rows."""
    return jnp.pad(x, ((0, 0), (0, pad)))


def barrier(tree: Any) -> Any:
    """Nothing of the tree is ready before all of it is."""
    return jax.lax.optimization_barrier(tree)
