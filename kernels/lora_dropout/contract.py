"""The three products of LoRA's A behind a dropout, for linear layers that share their input and have masks of their own.

With ``drop_m(x) = mask_m ∘ x · kept_scale`` (kernels/dropout/contract.py), A_m the rows of ``a_packed [lora_pad, in]`` that are
module m's, one module's behind the other's, and ``g = dy·sB [tokens, lora_pad]`` with module m's columns at the same places:

``project(x, a_packed, masks) -> xa [tokens, lora_pad]``
    Module m's columns are ``drop_m(x)·A_mᵀ``; columns past the ranks are zero. x ``[tokens, in]``, or longer rows whose columns
    past `in` are not looked at. On torch `out` may name where xa goes, the columns behind x's rows among other places.
``input_gradient(dx, g, a_packed, masks) -> dx``
    Adds ``Σ_m mask_m ∘ (g_m·A_m) · kept_scale`` to dx ``[tokens, in]``: summed in float32 and rounded once. In place on torch;
    where dx is not used again on JAX.
``gradient_a(g, x, masks, …)``
    ``g_mᵀ·drop_m(x)``, float32 ``[r_m, in]``: added to `totals`, one a module, on torch; returned as one ``[rank, in]`` on JAX.

Sums are float32; the same from run to run. No mask is kept: each product draws its own again.

``lora_dropout(x, a, masks) -> xa [tokens, rank]`` is `project` with a float32 ``a [rank, in]``, differentiable by both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from jaxsloth.kernels.registry import Implementation, Op, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance


@dataclass(frozen=True)
class Masks:
    """The dropout of the adapted modules of a group on tokens ``first …`` of a flat batch ``[len(rows) · length]``.

    key: the step's two words (`step_key`), and modules ``[n]``: the modules' words (`module_word`): uint32 on JAX, int64 on
    torch, on the device both. ranks: theirs. rows: int32 ``[batch]``, each row's index in the global batch of the step.
    """

    rate: float
    key: Any
    modules: Any
    ranks: tuple[int, ...]
    rows: Any
    length: int
    first: int = 0

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def places(self) -> tuple[slice, ...]:
        """Each module's columns of xa, or rows of a_packed."""
        ends = [sum(self.ranks[: index + 1]) for index in range(len(self.ranks))]
        return tuple(slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True))

    def at(self, first: int) -> Masks:
        """The same for tokens that begin `first` behind these."""
        return replace(self, first=self.first + first) if first else self

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """Neighbours of one rank, which a kernel takes at once: (first module, modules, first column, rank)."""
        module = column = 0
        for rank, members in groupby(self.ranks):
            count = len(list(members))
            yield module, count, column, rank
            module, column = module + count, column + count * rank


LORA_DROPOUT = Op(
    "lora_dropout",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.lora_dropout.triton_kernel:lora_dropout", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.lora_dropout.torch_ops:lora_dropout"),
        Implementation("pallas", "jax", "jaxsloth.kernels.lora_dropout.pallas_kernel:lora_dropout", needs_cuda),
        Implementation("xla", "jax", "jaxsloth.kernels.lora_dropout.xla_ops:lora_dropout"),
    ),
)
OPS = (LORA_DROPOUT,)
TOLERANCES = {
    "float32": Tolerance(output=2e-6, gradient=4e-6),
    "bfloat16": Tolerance(output=8e-3, gradient=1.2e-2),
    "float16": Tolerance(output=1e-3, gradient=1.5e-3),
}
