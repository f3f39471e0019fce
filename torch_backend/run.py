"""The settings of one pass over the blocks that all bodies share, and the caches of decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from jaxsloth.kernels.attention.library_ops import Layout
from jaxsloth.models import spec as specs

Tables = Mapping[specs.Rope, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Cache:
    """The keys and values of one layer, ``[batch, capacity, kv_heads, head_dim]``; slots below `used` are written."""

    keys: torch.Tensor
    values: torch.Tensor
    used: int = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the next slots and returns everything up to them."""
        end = self.used + keys.shape[1]
        self.keys[:, self.used : end] = keys
        self.values[:, self.used : end] = values
        self.used = end
        return self.keys[:, :end], self.values[:, :end]


@dataclass(frozen=True)
class DropoutKey:
    """The key of one step's masks: rng_key int64 ``[2]``, and the global number of every row, int32 ``[batch]``."""

    rng_key: torch.Tensor
    rows: torch.Tensor


class AugmentedWeight(Protocol):
    """A group's frozen weights W and adapters. a ``[pad, in]`` holds A and b ``[out, pad]`` the scaled B. layout: a
    `linear.GroupLayout`."""

    layout: Any
    a: torch.Tensor
    b: torch.Tensor

    def forward(self, x: torch.Tensor, xa: torch.Tensor | None, y: torch.Tensor) -> None:
        """``y = x·Wᵀ + xa·(sB)ᵀ + bias``. x ``[tokens, in or more]``; xa ``[tokens, pad]`` (None where pad is 0) lies behind
        the rows of x if those are longer than `in`."""
        ...

    def backward(self, dy: torch.Tensor, dx: torch.Tensor, adapters: bool = True) -> None:
        """``dx = dy·W + (dy·sB)·A``, or ``dy·W`` alone. dy ``[tokens, out + pad or more]`` with ``dy·sB`` behind its rows."""
        ...


class AugmentedWeights(Protocol):
    """The augmented weights of a model's groups."""

    def begin(self) -> None:
        """Takes over the adapters' values of this step."""
        ...

    def invalidate(self) -> None:
        """The contents of a shared buffer are no longer counted on: adapters may have changed, or a graph is captured."""
        ...

    def layout(self, group: Any) -> Any:
        """The `linear.GroupLayout` of a group."""
        ...

    def of(self, group: Any) -> AugmentedWeight:
        """The group's weight; the one that `of` gave before may be overwritten."""
        ...


@dataclass(frozen=True)
class Run:
    """The settings of one pass.

    tables: (cos, sin) ``[batch, length, half]`` a rotary setting. segments: int32 ``[batch, length]``, kv_segments likewise for
    the keys where they differ (the cache's slots). dropout: None outside training. caches: one a layer.
    Of written passes: layout says which tokens of the flat batch belong together; weights are the groups'; pairs: each body, or
    the `DefaultPair` in its place.
    """

    tables: Tables
    segments: torch.Tensor
    kv_segments: torch.Tensor | None = None
    dropout: DropoutKey | None = None
    caches: tuple[Cache, ...] | None = None
    layout: Layout | None = None
    weights: AugmentedWeights | None = None
    pairs: Mapping[Any, Any] = field(default_factory=dict)

    def weight(self, group: Any) -> AugmentedWeight:
        assert self.weights is not None
        return self.weights.of(group)

    def pad(self, group: Any) -> int:
        """Columns behind the rows of the group's input, and of its output's gradient."""
        assert self.weights is not None
        return self.weights.layout(group).pad


@dataclass(frozen=True)
class StepRun:
    """The settings of one token a row in a recorded program.

    tables: (cos, sin) ``[rows, half]`` a rotary setting. few_rows: each group's `few_rows.FewRows`. first int32 ``[rows]``: the
    first slot that a row sees; slot int64 ``[1]``: the one that is written. attention: the module with `append` and
    `attend`.
    """

    tables: Tables
    few_rows: Mapping[Any, Any]
    first: torch.Tensor
    slot: torch.Tensor
    attention: Any


def padded_rows(rows: int, width: int, pad: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised ``[rows, width + pad]``."""
    return torch.empty(rows, width + pad, dtype=like.dtype, device=like.device)
