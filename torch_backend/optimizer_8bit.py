"""AdamW with its moments in 8 bits, over the same flat buffer; bitsandbytes' numbers, tensor by tensor."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch

from jaxsloth.backend import OptimizerOptions
from jaxsloth.kernels.adamw_8bit.contract import ADAMW_8BIT, SMALLEST, Moments, blocks_of, check_stored, step_factors
from jaxsloth.kernels.registry import Target, resolve
from jaxsloth.torch_backend.optimizer import PARTS, AdamW, Flat, rates_and_decays


@dataclass(frozen=True)
class StoredRun:
    """Tensors that lie one after another in one part of the buffer, and are stored alike: in 8 bits, or in float32, without
    maxima."""

    shapes: dict[str, torch.Size]
    place: slice
    part: int
    moments: Moments

    def parts(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Each tensor's own moments, as views, by the names that a checkpoint has for them."""
        value, block = 0, 0
        for name, shape in self.shapes.items():
            size, blocks = shape.numel(), blocks_of(shape.numel())
            found = {}
            for key, array in vars(self.moments).items():
                if key.endswith("_absmax"):
                    if array is not None:
                        found[key] = array[block : block + blocks]
                else:
                    found[key] = array[value : value + size].view(shape)
            yield name, found
            value, block = value + size, block + blocks


def _runs(flat: Flat) -> list[StoredRun]:
    found, ends = [], accumulate(parameter.numel() for parameter in flat.parameters.values())
    placed = [(name, parameter.shape, end) for (name, parameter), end in zip(flat.parameters.items(), ends, strict=True)]
    for (part, small), group in groupby(placed, lambda item: (bisect_left(flat.ends, item[2]), item[1].numel() < SMALLEST)):
        items = list(group)
        sizes, stop = [shape.numel() for _, shape, _ in items], items[-1][2]
        place = slice(stop - sum(sizes), stop)
        kept = torch.zeros_like(flat.buffer[place], dtype=torch.float32 if small else torch.uint8)
        absmax = None if small else flat.buffer.new_zeros(sum(map(blocks_of, sizes)))
        moments = Moments(kept, absmax, kept.clone(), None if absmax is None else absmax.clone())
        found.append(StoredRun({name: shape for name, shape, _ in items}, place, part, moments))
    return found


class AdamW8bit(AdamW):
    """AdamW whose moments are stored as `kernels/adamw_8bit` says; tensors of fewer than 4096 values keep float32 ones."""

    def __init__(self, flat: Flat, options: OptimizerOptions, implementation: str | None = None) -> None:
        super().__init__(flat, options)
        self._step = resolve(ADAMW_8BIT, "torch", Target(flat.buffer.device.type), implementation)  # type: ignore[arg-type]
        # A row a part of the buffer: read from the device, so that a graph can hold the update.
        self._factors = torch.zeros(PARTS, 3, dtype=torch.float32, device=flat.buffer.device)

    def _make_moments(self) -> None:
        self._all = _runs(self.flat)

    def _update(self, learning_rate: float) -> None:
        self.count += 1
        parts = rates_and_decays(self.options, learning_rate)
        factors = [step_factors(rate, self.count, self.options.betas, decay) for rate, decay in parts]
        self._factors.copy_(torch.tensor(factors, dtype=torch.float32))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """The update by the factors at hand; all of it on the device."""
        options = self.options
        for run in self._all:
            parameter, gradient = self.flat.buffer[run.place], self.flat.gradient[run.place]
            factors = self._factors[run.part]
            if run.moments.exp_avg_absmax is None:
                _step_whole(parameter, gradient, run.moments, factors, options)
                continue
            sizes = tuple(shape.numel() for shape in run.shapes.values())
            self._step(parameter, gradient, run.moments, factors, sizes=sizes, betas=options.betas, eps=options.eps)

    def _moments(self) -> dict[str, np.ndarray]:
        return {
            f"{name}.{key}": part.cpu().numpy().copy()
            for run in self._all
            for name, parts in run.parts()
            for key, part in parts.items()
        }

    @torch.no_grad()
    def _load_moments(self, state: Mapping[str, np.ndarray]) -> None:
        check_stored(state, eight_bit=True)
        for run in self._all:
            for name, parts in run.parts():
                for key, part in parts.items():
                    part.copy_(torch.from_numpy(np.array(state[f"{name}.{key}"])))


def _step_whole(
    parameter: torch.Tensor, gradient: torch.Tensor, moments: Moments, factors: torch.Tensor, options: OptimizerOptions
) -> None:
    """A step on float32 moments."""
    decay, step_size, root = factors.unbind()
    (beta1, beta2), exp_avg, exp_avg_sq = options.betas, moments.exp_avg, moments.exp_avg_sq
    exp_avg.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    denominator = (exp_avg_sq.sqrt() / root).add_(options.eps)
    parameter.mul_(decay).sub_((exp_avg * step_size).div_(denominator))


def make_optimizer(flat: Flat, options: OptimizerOptions, implementations: Mapping[str, str] | None = None) -> AdamW:
    """The optimizer that `options.name` asks for."""
    if options.name == "adamw":
        return AdamW(flat, options)
    return AdamW8bit(flat, options, (implementations or {}).get(ADAMW_8BIT.name))
