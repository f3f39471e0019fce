"""One pass of a backend as a differentiable torch function of PEFT's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from jaxsloth.frontend.module.peft_adoption import Active, PeftAdapter
from jaxsloth.functional_model import FunctionalModel, Output, PassOptions, Tokens, Weights
from jaxsloth.models.names import LM_HEAD


@dataclass(frozen=True)
class Prepared:
    """A batch of rows of `length` tokens (padded in `tokens`), and what is active to run it with."""

    functional: FunctionalModel
    active: Active
    tokens: Tokens
    options: PassOptions
    length: int

    def run(self, output: Output, keep: int = 0) -> torch.Tensor:
        """One pass. keep: hidden states or logits of only so many last positions; 0: of all."""
        if output == "loss":
            return self._run(output, self.options)
        options = self.options
        if keep:
            count = min(keep, self.length)
            options = replace(options, first=self.length - count, count=count)
        return self._run(output, options)[:, : self.length]

    def _run(self, output: Output, options: PassOptions) -> torch.Tensor:
        adapters, full_weights = self.active.adapters, dict(self.active.full_weights)
        if output == "hidden":
            full_weights.pop(f"{LM_HEAD}.weight", None)
        groups = self.functional.groups(list(adapters))
        run: Any = torch.compiler.disable(
            ModulePass(self.functional, output, groups, adapters, full_weights, self.tokens, options)
        )
        return run()


@dataclass(frozen=True)
class ModulePass:
    """An output and its weights. groups: see `FunctionalModel.groups`; adapters: by layer; full_weights: by tensor."""

    functional: FunctionalModel
    output: Output
    groups: Mapping[str, Sequence[str | None]]
    adapters: Mapping[str, PeftAdapter]
    full_weights: Mapping[str, nn.Parameter]
    tokens: Tokens
    options: PassOptions

    def __call__(self) -> torch.Tensor:
        parameters = [
            *(part for adapter in self.adapters.values() for part in (adapter.a, adapter.b)),
            *self.full_weights.values(),
        ]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return _Differentiable.apply(self, *parameters)  # type: ignore[return-value]
        with torch.no_grad():
            weights = self.weights()  # alive until the result is torch's: what reuses their memory must come after
            return to_torch(self.functional.run(self.output, weights, self.tokens, self.options))

    def weights(self) -> Weights:
        """Every group's A and scaled B, float32: copies, since an optimizer may write its parameters while JAX still reads.
        Fully trained weights are too large for that and come as they are."""
        stacks = {key: (self._stack(members, "a"), self._stack(members, "b")) for key, members in self.groups.items()}
        return stacks | {name: (own.detach().float().to(self.functional.device),) for name, own in self.full_weights.items()}

    def _stack(self, members: Sequence[str | None], part: str) -> torch.Tensor:
        present = {name: getattr(self.adapters[name], part) for name in members if name is not None}
        axis = -2 if part == "a" else -1
        rank = max(tensor.shape[axis] for tensor in present.values())
        for name, tensor in present.items():  # ranks may differ (rank_pattern): zeros add nothing
            missing = rank - tensor.shape[axis]
            present[name] = functional.pad(tensor, (0, 0, 0, missing) if part == "a" else (0, missing)) if missing else tensor
        nothing = torch.zeros_like(next(iter(present.values()))) if len(present) < len(members) else None
        stacked = torch.stack([nothing if name is None else present[name] for name in members]).float()  # type: ignore[misc]
        if part == "b":
            stacked *= self._scaling(members, stacked)
        return stacked.to(self.functional.device)

    def _scaling(self, members: Sequence[str | None], like: torch.Tensor) -> float | torch.Tensor:
        """One number, or ``[n, 1, 1]`` where they differ, which takes a copy to the device."""
        values = [0.0 if name is None else self.adapters[name].scaling for name in members]
        used = {self.adapters[name].scaling for name in members if name is not None}
        if len(used) == 1:
            return used.pop()
        return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]

    def by_parameter(self, gradients: Weights) -> list[torch.Tensor]:
        """The weights' gradients as those of the parameters, in their order: A, B, A, B, … and what is trained whole."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for key, members in self.groups.items():
            a, b = (to_torch(gradient) for gradient in gradients[key])
            # New memory: clipping writes gradients in place, and what JAX made may not be written.
            a, b = a.clone(), b * self._scaling(members, b)
            for name, of_a, of_b in zip(members, a, b, strict=True):
                if name is not None:
                    rank = self.adapters[name].a.shape[0]
                    found[name] = (of_a, of_b) if rank == len(of_a) else (of_a[:rank], of_b[:, :rank])
        ordered = [(found[name], adapter) for name, adapter in self.adapters.items()]
        of_adapters = [g.to(p) for (of_a, of_b), adapter in ordered for g, p in ((of_a, adapter.a), (of_b, adapter.b))]
        return [*of_adapters, *(to_torch(gradients[name][0]).to(p, copy=True) for name, p in self.full_weights.items())]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: ModulePass, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        ctx.what = what
        weights = what.weights()
        value, ctx.pullback = what.functional.differentiate(what.output, weights, what.tokens, what.options)
        return to_torch(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        # Nothing is read of them, but torch raises here when an optimizer has written them since the forward pass.
        _ = ctx.saved_tensors
        gradients = ctx.pullback(cotangent.contiguous().to(ctx.what.functional.device))
        return None, *ctx.what.by_parameter(gradients)


def to_torch(array: Any) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
