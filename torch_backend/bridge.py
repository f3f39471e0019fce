"""What a torch module over this backend calls: passes that are pure in the adapters and the batch, as on JAX.

The decoder holds an adapter, or what is trained whole (biases, the embedding, the head), only while a pass or its backward
runs: blocks that are run again in the backward must meet the adapters of their own forward, whatever is active by then. A pass
is the written-out one (guest.py) where a train step would take it, else the composed ops under autograd.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from jaxsloth.batch import IGNORE, Batch
from jaxsloth.bridge import Output, PassOptions, Pullback, Tokens, Weights
from jaxsloth.models.names import EMBEDDING, stacked_name
from jaxsloth.torch_backend.guest import SEPARATOR, Guest, guest_spec, members
from jaxsloth.torch_backend.layers import Adapter, Context, Linear
from jaxsloth.torch_backend.passes import runs_fused
from jaxsloth.torch_backend.placement import to_device
from jaxsloth.torch_backend.state import ModelState

Leaves = Mapping[str, tuple[nn.Parameter, ...]]  # a layer's A and B, or what stands in place of a base tensor, by name


class Bridge:
    """See `jaxsloth.bridge.Bridge`. A group is a kind of layer over all blocks that have it adapted; its name is theirs."""

    def __init__(self, model: ModelState) -> None:
        self._model, self._decoder = model, model.decoder
        self._layers, self._base = model.decoder.linears(), model.keep_base()
        places = {name: name.rpartition(".") for name in self._base}
        self._owners = {n: (model.decoder.get_submodule(own)._parameters, part) for n, (own, _, part) in places.items()}
        self._groups: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
        self._fused: dict[Any, bool] = {}
        self._guest: tuple[Any, Guest] | None = None  # the last one, and what it was made for
        self.device = str(model.decoder.device)

    def groups(self, modules: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        key = tuple(modules)
        if key not in self._groups:
            kinds: dict[str, list[str]] = {}
            period = self._model.spec.layer_period()
            for module in modules:
                kinds.setdefault(stacked_name(module, period)[0], []).append(module)
            self._groups[key] = {SEPARATOR.join(found): tuple(found) for found in kinds.values()}
        return self._groups[key]

    def padded_length(self, length: int) -> int:
        return length

    def base_weight(self, module: str) -> torch.Tensor:
        name = EMBEDDING if self._model.spec.head.tied else module
        return self._base[f"{name}.weight"].detach()

    @torch.no_grad()
    def fingerprint(self) -> bytes:
        digest = hashlib.sha256()
        for tensor in self._decoder.state_dict().values():
            flat = tensor.flatten().float()
            wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float32, device=flat.device))
            digest.update(torch.stack([flat.sum(), flat.abs().sum(), flat @ wave]).cpu().numpy().tobytes())
        return digest.digest()

    @torch.no_grad()
    def run(self, output: Output, weights: Weights, batch: Tokens, options: PassOptions) -> torch.Tensor:
        rows = batch.as_batch()
        guest = None if rows is None else self._guest_of(weights, options, learns=False)
        if guest is None or rows is None:
            with self._holding(_leaves(weights), options):
                return self._evaluate(output, batch, options)
        with self._holding(guest.leaves, PassOptions()):
            if output == "loss":
                return guest.loss(weights, rows)
            hidden, _ = guest.hidden(weights, rows, learns=False)
            return self._shown(output, hidden.unflatten(0, rows.input_ids.shape), options)

    def differentiate(
        self, output: Output, weights: Weights, batch: Tokens, options: PassOptions
    ) -> tuple[torch.Tensor, Pullback]:
        rows = batch.as_batch()
        guest = None if rows is None else self._guest_of(weights, options, learns=True)
        if guest is None or rows is None:
            return self._differentiate_composed(output, weights, batch, options)
        if output != "loss":
            return self._differentiate_hidden(output, guest, weights, rows, options)
        with self._holding(guest.leaves, PassOptions()):
            loss, gradients = guest.loss_and_gradients(weights, rows)

        def scaled(cotangent: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            return {group: (a * cotangent, b * cotangent) for group, (a, b) in gradients.items()}

        return loss, scaled

    def _guest_of(self, weights: Weights, options: PassOptions, learns: bool) -> Guest | None:
        """The written-out pass for these adapters, or None where a train step would not take it either.

        One is held, since each may hold weights. Without any it is the last one, so that a reference rounds as its policy.

        Raises:
            RefusedError: it was asked for by name and can't train this model.
        """
        if not weights:
            return None if self._guest is None else self._guest[1]
        shapes = tuple((name, *(tensor.shape for tensor in own)) for name, own in weights.items())
        asked = (shapes, options.dropout)
        if asked not in self._fused:
            spec = guest_spec(self._model.spec, weights, options.dropout)
            self._fused[asked] = runs_fused(self._decoder, spec, self._model.options)
        if not self._fused[asked]:
            return None
        key = (shapes, options.checkpointing)
        if self._guest is None or self._guest[0][0] != shapes or (learns and self._guest[0] != key):
            self._guest = None  # its memory goes before the next one's comes
            own = replace(self._model.options, gradient_checkpointing=options.checkpointing)
            self._guest = key, Guest(self._decoder, self._model.spec, weights, own)
        return self._guest[1]

    def _differentiate_hidden(
        self, output: Output, guest: Guest, adapters: Weights, rows: Batch, options: PassOptions
    ) -> tuple[torch.Tensor, Pullback]:
        with self._holding(guest.leaves, PassOptions()):
            hidden, backward = guest.hidden(adapters, rows, learns=True)
            leaf = hidden.unflatten(0, rows.input_ids.shape).requires_grad_()
            with torch.enable_grad():
                value = self._shown(output, leaf, options)

        def pull(cotangent: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            with self._holding(guest.leaves, PassOptions()):
                (dhidden,) = torch.autograd.grad(value, leaf, cotangent)
                gradients = backward(dhidden.flatten(0, 1).contiguous())
            return {group: (a, b) for group, (a, b) in gradients.items()}

        return value.detach(), pull

    def _differentiate_composed(
        self, output: Output, weights: Weights, batch: Tokens, options: PassOptions
    ) -> tuple[torch.Tensor, Pullback]:
        leaves = _leaves(weights)
        flat = [leaf for own in leaves.values() for leaf in own]
        with torch.enable_grad(), self._holding(leaves, options):
            value = self._evaluate(output, batch, options)

        def pull(cotangent: torch.Tensor) -> Weights:
            with self._holding(leaves, options):
                gradients = iter(torch.autograd.grad(value, flat, cotangent, retain_graph=True))
            by_leaf = {name: [next(gradients) for _ in own] for name, own in leaves.items()}
            found: dict[str, tuple[torch.Tensor, ...]] = {}
            for name, own in weights.items():
                if len(own) == 1:
                    found[name] = tuple(by_leaf[name])
                else:
                    parts = zip(*(by_leaf[module] for module in members(name)), strict=True)
                    found[name] = tuple(torch.stack(part) for part in parts)
            return found

        return value.detach(), pull

    @contextmanager
    def _holding(self, leaves: Leaves, options: PassOptions) -> Iterator[None]:
        """The decoder with these weights over its base and no others, in its own dtypes; afterwards it has what it had."""
        before, self._decoder._recompute = self._decoder._recompute, options.checkpointing not in ("none", "auto")
        swapped: list[tuple[Linear, Adapter]] = []
        whole = {name: own[part] for name, (own, part) in self._owners.items()}
        try:
            for name, (own, part) in self._owners.items():
                (own[part],) = leaves.get(name, (self._base[name],))
            for layer in self._layers:
                a, b = leaves.get(layer.name, (None, None))
                swapped.append((layer, layer.swap_adapter((a, b, 1.0, options.dropout))))  # the scaling is folded into B
            with torch.autocast(self._decoder.device.type, enabled=False):
                yield
        finally:
            self._decoder._recompute = before
            for layer, adapter in swapped:
                layer.swap_adapter(adapter)
            for name, (own, part) in self._owners.items():
                own[part] = whole[name]

    def _evaluate(self, output: Output, batch: Tokens, options: PassOptions) -> torch.Tensor:
        decoder, device = self._decoder, self._decoder.device
        rows = torch.arange(batch.input_ids.shape[0], dtype=torch.int32, device=device)
        words = None if batch.dropout_words is None else torch.tensor(batch.dropout_words, device=device)
        ids, positions, segments, kv_segments = (
            to_device(array, device) for array in (batch.input_ids, batch.positions, batch.segments, batch.kv_segments)
        )
        tables = decoder.rope_tables(positions, batch.longest)
        context = Context(tables, segments, kv_segments, rows=rows, dropout_words=words)
        if output == "loss":
            assert batch.targets is not None
            chosen = (batch.targets != IGNORE).reshape(-1).nonzero()[0]
            return decoder.loss(ids, context, to_device(batch.targets, device), to_device(chosen, device))
        return self._shown(output, decoder.hidden(ids, context), options)

    def _shown(self, output: Output, hidden: torch.Tensor, options: PassOptions) -> torch.Tensor:
        """What is asked for of all hidden states."""
        if options.count is not None:
            hidden = hidden[:, options.first : options.first + options.count]
        return self._decoder.logits(hidden) if output == "logits" else hidden


def _leaves(weights: Weights) -> Leaves:
    """Every layer's own A and B, the parts of the stacks, and what is trained whole as it is."""
    found: dict[str, tuple[nn.Parameter, ...]] = {}
    for group, own in weights.items():
        if len(own) == 1:
            found[group] = (nn.Parameter(own[0]),)
            continue
        for module, a, b in zip(members(group), *own, strict=True):
            found[module] = nn.Parameter(a), nn.Parameter(b)
    return found
