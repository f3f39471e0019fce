"""AdamW over one flat buffer: every trained tensor is a view of it, so that a step takes a dozen launches in all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxsloth.backend import OptimizerOptions
from jaxsloth.kernels.adamw_8bit.contract import check_stored
from jaxsloth.models.names import is_embedding
from jaxsloth.torch_backend.devices import sum_over_processes

LOSS_SCALE_START, LOSS_SCALE_GROWTH_INTERVAL = 65536.0, 2000
PARTS = 3


class Flat:
    """The trained tensors, by PEFT name, as views of one float32 buffer: the embedding and the head, the adapters, and last
    the biases, which weight decay spares.

    ends: where each of the three parts ends.
    """

    def __init__(self, values: Mapping[str, np.ndarray], device: torch.device) -> None:
        names = sorted(values, key=_place)  # a stable sort: the order within each part stays
        sizes = [sum(values[name].size for name in names if _part(name) == part) for part in range(PARTS)]
        self.ends = tuple(accumulate(sizes))
        self.buffer = torch.empty(sum(values[name].size for name in names), dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.buffer)
        self.parameters: dict[str, nn.Parameter] = {}
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        start = 0
        for name in names:
            self._places[name] = (start, values[name].shape)
            parameter = nn.Parameter(self.view(self.buffer, name))
            parameter.grad = self.view(self.gradient, name)
            self.parameters[name] = parameter
            start += values[name].size
        self.load(self.buffer, values)

    def places(self) -> tuple[slice, ...]:
        return tuple(slice(start, end) for start, end in zip((0, *self.ends), self.ends, strict=False))

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        start, shape = self._places[name]
        return buffer[start : start + int(np.prod(shape))].view(shape)

    def load(self, buffer: torch.Tensor, values: Mapping[str, np.ndarray]) -> None:
        with torch.no_grad():
            for name in self._places:
                self.view(buffer, name).copy_(torch.from_numpy(np.array(values[name], np.float32)))

    def read(self, buffer: torch.Tensor) -> dict[str, np.ndarray]:
        host = buffer.detach().cpu()
        return {name: self.view(host, name).numpy().copy() for name in self._places}

    @contextmanager
    def zeroed(self) -> Iterator[None]:
        """All values 0 meanwhile: adapters that change nothing."""
        kept = self.buffer.clone()
        try:
            with torch.no_grad():
                self.buffer.zero_()
            yield
        finally:
            with torch.no_grad():
                self.buffer.copy_(kept)


# Projections of one input: their A lie one behind the other, so that one product forms all their gradients.
_SIBLINGS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def _place(name: str) -> tuple[Any, ...]:
    """Where a tensor stands in the buffer: by part, layer by layer, siblings' A before their B."""
    parts = [_SIBLINGS.get(part, part) for part in name.split(".")]
    return _part(name), tuple(int(part) for part in parts if part.isdigit()), parts


def _part(name: str) -> int:
    """0: the embedding or the head; 1: an adapter; 2: a bias."""
    if name.endswith(".bias"):
        return 2
    return 0 if is_embedding(name.split(".")) else 1


def rates_and_decays(options: OptimizerOptions, learning_rate: float) -> tuple[tuple[float, float], ...]:
    """(learning rate, weight decay) of each part of the buffer. Biases are not decayed, as in Hugging Face's Trainer."""
    decay = options.weight_decay
    return (learning_rate * options.embedding_rate, decay), (learning_rate, decay), (learning_rate, 0.0)


def total_norm(gradient: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm, float32. On a CPU it is summed in float64: torch's float32 sum of 40 million squares is 2e-3 off."""
    wide = torch.float64 if gradient.device.type == "cpu" else None
    return torch.linalg.vector_norm(gradient, dtype=wide).float()


class AdamW:
    """Decoupled weight decay, bias correction, eps outside the root (Loshchilov & Hutter 2019, alg. 2), with global-norm
    clipping and, in float16, dynamic loss scaling."""

    def __init__(self, flat: Flat, options: OptimizerOptions) -> None:
        self.flat, self.options = flat, options
        self._make_moments()
        self.count = 0
        self.loss_scale = LOSS_SCALE_START if options.loss_scaling else 1.0
        self.good_steps = 0
        self._frozen: torch.Tensor | None = None  # where the buffer holds what stays as it is

    def freeze(self, names: Collection[str]) -> None:
        """See `jaxsloth.backend.TrainStep.freeze`."""
        self._frozen = torch.zeros_like(self.flat.buffer, dtype=torch.bool) if names else None
        for name in names:
            self.flat.view(self._frozen, name).fill_(True)  # type: ignore[arg-type]

    def _make_moments(self) -> None:
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.flat.buffer), torch.zeros_like(self.flat.buffer)

    @torch.no_grad()
    def step(self, learning_rate: float, loss: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Sums the gradients (and `loss`) over processes, clips and updates: (gradient norm before clipping, skipped)."""
        gradient, options = self.flat.gradient, self.options
        if self._frozen is not None:
            gradient.masked_fill_(self._frozen, 0.0)
        sum_over_processes(gradient)
        sum_over_processes(loss)
        if options.loss_scaling:
            gradient.div_(self.loss_scale)
        norm = total_norm(gradient)
        # Reading the norm waits for the device: float16 alone needs it, to know whether to skip.
        if options.loss_scaling and not self._adapt_scale(bool(torch.isfinite(norm))):
            return norm, True
        if options.max_grad_norm is not None:
            gradient.mul_((options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        if self._frozen is None:
            self._update(learning_rate)
        else:
            before = self.flat.buffer.clone()
            self._update(learning_rate)
            self.flat.buffer.copy_(torch.where(self._frozen, before, self.flat.buffer))
        return norm, False

    def _adapt_scale(self, finite: bool) -> bool:
        if not finite:
            self.loss_scale, self.good_steps = self.loss_scale / 2, 0
        else:
            self.good_steps += 1
            if self.good_steps == LOSS_SCALE_GROWTH_INTERVAL:
                self.loss_scale, self.good_steps = self.loss_scale * 2, 0
        return finite

    def _update(self, learning_rate: float) -> None:
        (beta1, beta2), flat = self.options.betas, self.flat
        self.count += 1
        if flat.buffer.is_cuda:
            self._update_in_one_pass(learning_rate)
            return
        self.exp_avg.lerp_(flat.gradient, 1.0 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(flat.gradient, flat.gradient, value=1.0 - beta2)
        correction1, correction2 = 1.0 - beta1**self.count, 1.0 - beta2**self.count
        denominator = (self.exp_avg_sq.sqrt() / correction2**0.5).add_(self.options.eps)
        for place, (rate, decay) in zip(flat.places(), rates_and_decays(self.options, learning_rate), strict=True):
            flat.buffer[place].mul_(1.0 - rate * decay)
            flat.buffer[place].addcdiv_(self.exp_avg[place], denominator[place], value=-rate / correction1)

    def _update_in_one_pass(self, learning_rate: float) -> None:
        """torch's fused kernel: the buffers are read and written once."""
        beta1, beta2 = self.options.betas
        buffers = (self.flat.buffer, self.flat.gradient, self.exp_avg, self.exp_avg_sq)
        steps = torch.full((1,), float(self.count), device=self.flat.buffer.device)
        for place, (rate, decay) in zip(self.flat.places(), rates_and_decays(self.options, learning_rate), strict=True):
            if place.start == place.stop:
                continue
            parameter, gradient, first, second = (buffer[place] for buffer in buffers)
            torch._fused_adamw_(
                [parameter],
                [gradient],
                [first],
                [second],
                [],
                [steps],
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=self.options.eps,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, np.ndarray]:
        found = self._moments()
        found["count"] = np.array(self.count, np.int64)
        if self.options.loss_scaling:
            found["loss_scale"] = np.array(self.loss_scale, np.float32)
            found["good_steps"] = np.array(self.good_steps, np.int64)
        return found

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._load_moments(state)
        self.count = int(state["count"])
        if self.options.loss_scaling:
            self.loss_scale = float(state.get("loss_scale", LOSS_SCALE_START))
            self.good_steps = int(state.get("good_steps", 0))

    def _moments(self) -> dict[str, np.ndarray]:
        found = {f"{name}.exp_avg": value for name, value in self.flat.read(self.exp_avg).items()}
        return found | {f"{name}.exp_avg_sq": value for name, value in self.flat.read(self.exp_avg_sq).items()}

    def _load_moments(self, state: Mapping[str, np.ndarray]) -> None:
        check_stored(state, eight_bit=False)
        names = self.flat.parameters
        self.flat.load(self.exp_avg, {name: state[f"{name}.exp_avg"] for name in names})
        self.flat.load(self.exp_avg_sq, {name: state[f"{name}.exp_avg_sq"] for name in names})
