"""Activations in pinned host memory between a layer's forward and its backward, copied on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

Named = dict[Any, torch.Tensor]
# Layers whose copies to the host may be under way while later ones compute.
IN_FLIGHT = 2


@dataclass
class Offloaded:
    """A layer's tensors on the host, and on their way back once `arrived` is set."""

    host: Named
    arriving: Named | None = None
    arrived: Any = None  # an event of the copying stream


class ActivationOffload:
    """Sends tensors away in layer order and brings them back in the reverse one, a layer ahead of its use."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._leaving: deque[tuple[Any, list[torch.Tensor]]] = deque()
        self._pool: dict[tuple[Any, ...], list[Named]] = {}  # host memory not in use, by shapes

    def put(self, tensors: Named) -> Offloaded:
        """Starts a layer's copies; the device memory is free once they are done."""
        host = self._host(tensors)
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                host[name].copy_(tensor, non_blocking=True)
        # The tensors stay referenced, so that nothing takes their memory, until the compute stream has waited for the copies.
        self._leaving.append((self._stream.record_event(), list(tensors.values())))
        while len(self._leaving) > IN_FLIGHT:
            current.wait_event(self._leaving.popleft()[0])
        return Offloaded(host)

    def get(self, layers: Sequence[Offloaded | None], index: int, first: int) -> Named:
        """The tensors of layer `index`, on the device; layer index - 1 is sent for."""
        current = torch.cuda.current_stream(self._stream.device)
        while self._leaving:
            current.wait_event(self._leaving.popleft()[0])
        for wanted in (index, index - 1):
            one = layers[wanted] if wanted >= first else None
            if one is not None:
                self._send_for(one)
        away = layers[index]
        assert away is not None and away.arriving is not None and away.arrived is not None
        current.wait_event(away.arrived)
        self._pool[_shapes(away.host)].append(away.host)
        found, away.arriving = away.arriving, None
        return found

    def _send_for(self, away: Offloaded) -> None:
        if away.arriving is not None:
            return
        arriving = {name: torch.empty_like(host, device=self._stream.device) for name, host in away.host.items()}
        # The memory may have been another tensor's a moment ago.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for name, host in away.host.items():
                arriving[name].copy_(host, non_blocking=True)
        away.arriving, away.arrived = arriving, self._stream.record_event()

    def _host(self, tensors: Named) -> Named:
        free = self._pool.setdefault(_shapes(tensors), [])
        if free:
            return free.pop()
        return {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}


def _shapes(tensors: Named) -> tuple[Any, ...]:
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
