"""Passes that a torch module over this backend calls, pure in the adapters and the batch, as on JAX.

The decoder holds an adapter, or what is trained whole (biases, the embedding, the head), only while a pass or its backward
runs: blocks that are run again in the backward must meet the adapters of their own forward, whatever is active by then. A pass
is the written one (external_adapters.py) where a train step would take it, else the bodies' `forward` under autograd.
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
from jaxsloth.functional_model import Output, PassOptions, Pullback, Tokens, Weights
from jaxsloth.models.names import EMBEDDING, LM_HEAD, stacked_name
from jaxsloth.torch_backend import autograd_pass
from jaxsloth.torch_backend.devices import to_device
from jaxsloth.torch_backend.external_adapters import SEPARATOR, FunctionalPass, Gradients, external_spec, members
from jaxsloth.torch_backend.linear import AdapterState, Linear
from jaxsloth.torch_backend.run import DropoutKey, Run
from jaxsloth.torch_backend.state import ModelState
from jaxsloth.torch_backend.written_program import runs_written

Leaves = Mapping[str, tuple[nn.Parameter, ...]]  # a layer's A and B, or what stands in place of a base tensor, by name


class FunctionalModel:
    """See the protocol. A group is a kind of layer over all blocks that have it adapted; its name is theirs."""

    def __init__(self, model: ModelState) -> None:
        self._model, self._decoder = model, model.decoder
        self._layers, self._base = model.decoder.linears(), model.keep_base()
        places = {name: name.rpartition(".") for name in self._base}
        self._owners = {n: (model.decoder.get_submodule(own)._parameters, part) for n, (own, _, part) in places.items()}
        self._groups: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
        self._written: dict[Any, bool] = {}
        self._functional_pass: tuple[Any, FunctionalPass] | None = None  # the last one, and what it was made for
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
        functional_pass = None if rows is None else self._pass_of(weights, options, learns=False)
        if functional_pass is None or rows is None:
            with self._holding(_leaves(weights), options):
                return self._evaluate(output, batch, options)
        with self._holding(functional_pass.leaves, options):
            if output == "loss":
                return functional_pass.loss(weights, rows, batch.rng_key)
            hidden, _ = functional_pass.hidden(weights, rows, batch.rng_key, learns=False)
            return self._shown(output, hidden.unflatten(0, rows.input_ids.shape), options)

    def differentiate(
        self, output: Output, weights: Weights, batch: Tokens, options: PassOptions
    ) -> tuple[torch.Tensor, Pullback]:
        rows = batch.as_batch()
        functional_pass = None if rows is None else self._pass_of(weights, options, learns=True)
        if functional_pass is None or rows is None:
            return self._differentiate_by_autograd(output, weights, batch, options)
        if output != "loss":
            return self._differentiate_hidden(output, functional_pass, weights, rows, batch.rng_key, options)
        with self._holding(functional_pass.leaves, options):
            loss, gradients = functional_pass.loss_and_gradients(weights, rows, batch.rng_key)

        def scaled(cotangent: torch.Tensor) -> Gradients:
            return {group: tuple(gradient * cotangent for gradient in own) for group, own in gradients.items()}

        return loss, scaled

    def _pass_of(self, weights: Weights, options: PassOptions, learns: bool) -> FunctionalPass | None:
        """The written-out pass for these adapters, or None where a train step would not take it either.

        One is held, since each may hold weights. Without any it is the last one, so that a reference rounds as its policy.

        Raises:
            RefusedError: it was asked for by name and can't train this model.
        """
        if not weights:
            return None if self._functional_pass is None else self._functional_pass[1]
        shapes = tuple((name, *(tensor.shape for tensor in own)) for name, own in weights.items())
        asked = (shapes, options.dropout)
        if asked not in self._written:
            spec = external_spec(self._model.spec, weights, options.dropout)
            self._written[asked] = runs_written(self._decoder, spec, self._model.options)
        if not self._written[asked]:
            return None
        key = (shapes, options.checkpointing, options.dropout)
        # One made for training serves evaluations too: without a key nothing is dropped.
        differs = (learns or options.dropout > 0) and self._functional_pass is not None and self._functional_pass[0] != key
        if self._functional_pass is None or self._functional_pass[0][0] != shapes or differs:
            self._functional_pass = None  # its memory goes before the next one's comes
            own = replace(self._model.options, gradient_checkpointing=options.checkpointing)
            self._functional_pass = key, FunctionalPass(self._decoder, self._model.spec, weights, own, options.dropout)
        return self._functional_pass[1]

    def _differentiate_hidden(
        self,
        output: Output,
        functional_pass: FunctionalPass,
        weights: Weights,
        rows: Batch,
        rng_key: tuple[int, int] | None,
        options: PassOptions,
    ) -> tuple[torch.Tensor, Pullback]:
        head = f"{LM_HEAD}.weight"
        trained = functional_pass.leaves.get(head, ()) if output == "logits" else ()
        with self._holding(functional_pass.leaves, options):
            hidden, backward = functional_pass.hidden(weights, rows, rng_key, learns=True)
            leaf = hidden.unflatten(0, rows.input_ids.shape).requires_grad_()
            with torch.enable_grad():
                value = self._shown(output, leaf, options)

        def pull(cotangent: torch.Tensor) -> Gradients:
            with self._holding(functional_pass.leaves, options):
                dhidden, *of_head = torch.autograd.grad(value, [leaf, *trained], cotangent)
                gradients = backward(dhidden.flatten(0, 1).contiguous())
            for gradient in of_head:
                gradients[head][0].add_(gradient)
            return gradients

        return value.detach(), pull

    def _differentiate_by_autograd(
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
        before, self._decoder.recompute = self._decoder.recompute, options.checkpointing not in ("none", "auto")
        swapped: list[tuple[Linear, AdapterState]] = []
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
            self._decoder.recompute = before
            for layer, adapter in swapped:
                layer.swap_adapter(adapter)
            for name, (own, part) in self._owners.items():
                own[part] = whole[name]

    def _evaluate(self, output: Output, batch: Tokens, options: PassOptions) -> torch.Tensor:
        decoder, device = self._decoder, self._decoder.device
        dropout = None
        if batch.rng_key is not None:
            rows = torch.arange(batch.input_ids.shape[0], dtype=torch.int32, device=device)
            dropout = DropoutKey(torch.tensor(batch.rng_key, device=device), rows)
        ids, positions, segments, kv_segments = (
            to_device(array, device) for array in (batch.input_ids, batch.positions, batch.segments, batch.kv_segments)
        )
        tables = decoder.rope_tables(positions, batch.longest)
        run = Run(tables, segments, kv_segments, dropout)
        if output == "loss":
            assert batch.targets is not None
            positions = to_device((batch.targets != IGNORE).reshape(-1).nonzero()[0], device)
            return autograd_pass.loss(decoder, ids, run, to_device(batch.targets, device), positions)
        return self._shown(output, autograd_pass.hidden(decoder, ids, run), options)

    def _shown(self, output: Output, hidden: torch.Tensor, options: PassOptions) -> torch.Tensor:
        """The positions that are asked for, as hidden states or logits."""
        if options.count is not None:
            hidden = hidden[:, options.first : options.first + options.count]
        return self._decoder.lm_head(hidden) if output == "logits" else hidden


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
