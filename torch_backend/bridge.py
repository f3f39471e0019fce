"""What a torch module over this backend calls: passes that are pure in the adapters and the batch, as on JAX.

The decoder's layers hold an adapter only while a pass or its backward runs: blocks that are run again in the backward must meet
the adapters of their own forward, whatever is active by then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from jaxsloth.backend import Output, PassOptions, Pullback, Tokens
from jaxsloth.batch import IGNORE
from jaxsloth.torch_backend.layers import Context

if TYPE_CHECKING:
    from jaxsloth.torch_backend.model import TorchModel

Stacks = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Adapters = Mapping[str, tuple[nn.Parameter, nn.Parameter]]


class Bridge:
    """See `jaxsloth.backend.Bridge`. Every layer's adapter is a group of its own."""

    def __init__(self, model: TorchModel) -> None:
        self._decoder = model.decoder
        self._layers = model.decoder.linears()
        self.device = str(model.decoder.device)

    def groups(self, modules: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
        return {module: (module,) for module in modules}

    def padded_length(self, length: int) -> int:
        return length

    def head_weight(self) -> torch.Tensor:
        return self._decoder.lm_head.weight.detach().to(self._decoder.dtype)

    @torch.no_grad()
    def fingerprint(self) -> bytes:
        digest = hashlib.sha256()
        for tensor in self._decoder.state_dict().values():
            flat = tensor.flatten().float()
            wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float32, device=flat.device))
            digest.update(torch.stack([flat.sum(), flat.abs().sum(), flat @ wave]).cpu().numpy().tobytes())
        return digest.digest()

    @torch.no_grad()
    def run(self, output: Output, adapters: Stacks, batch: Tokens, options: PassOptions) -> torch.Tensor:
        with self._holding(_leaves(adapters), options):
            return self._evaluate(output, batch, options)

    def differentiate(
        self, output: Output, adapters: Stacks, batch: Tokens, options: PassOptions
    ) -> tuple[torch.Tensor, Pullback]:
        leaves = _leaves(adapters)
        flat = [leaf for pair in leaves.values() for leaf in pair]
        with torch.enable_grad(), self._holding(leaves, options):
            value = self._evaluate(output, batch, options)

        def pull(cotangent: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            with self._holding(leaves, options):
                gradients = torch.autograd.grad(value, flat, cotangent, retain_graph=True)
            stacked = [gradient[None] for gradient in gradients]
            return dict(zip(leaves, zip(stacked[::2], stacked[1::2], strict=True), strict=True))

        return value.detach(), pull

    @contextmanager
    def _holding(self, adapters: Adapters, options: PassOptions) -> Iterator[None]:
        """The decoder with these adapters and no others, in its own dtypes; afterwards it has what it had."""
        before, self._decoder._recompute = self._decoder._recompute, options.recompute
        swapped = []
        try:
            for layer in self._layers:
                a, b = adapters.get(layer.name, (None, None))
                swapped.append((layer, layer.swap_adapter((a, b, 1.0, options.dropout))))  # the scaling is folded into B
            with torch.autocast(self._decoder.device.type, enabled=False):
                yield
        finally:
            self._decoder._recompute = before
            for layer, adapter in swapped:
                layer.swap_adapter(adapter)

    def _evaluate(self, output: Output, batch: Tokens, options: PassOptions) -> torch.Tensor:
        decoder, device = self._decoder, self._decoder.device
        rows = torch.arange(batch.input_ids.shape[0], dtype=torch.int32, device=device)
        words = None if batch.dropout_words is None else torch.tensor(batch.dropout_words, device=device)
        tables = decoder.rope_tables(batch.positions, batch.longest)
        context = Context(tables, batch.segments, batch.kv_segments, rows=rows, dropout_words=words)
        if output == "loss":
            chosen = (batch.targets != IGNORE).flatten().nonzero().squeeze(1)
            return decoder.loss(batch.input_ids, context, batch.targets, chosen)
        hidden = decoder.hidden(batch.input_ids, context)
        if options.count is not None:
            hidden = hidden[:, options.first : options.first + options.count]
        return decoder.logits(hidden) if output == "logits" else hidden


def _leaves(adapters: Stacks) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Stacks of one are the layer's own A and B."""
    return {name: (nn.Parameter(a[0]), nn.Parameter(b[0])) for name, (a, b) in adapters.items()}
