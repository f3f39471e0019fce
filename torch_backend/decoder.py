"""The decoder: embedding, blocks, final norm, and the head with its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from jaxsloth.kernels.rope.torch_ops import tables
from jaxsloth.models import rope as models_rope
from jaxsloth.models import spec as specs
from jaxsloth.models.buildable import check_buildable
from jaxsloth.models.names import EMBEDDING, FINAL_NORM, LM_HEAD
from jaxsloth.torch_backend.layers import Block, Context, Linear, Ops, RMSNorm, Take, _dense


class Embedding(nn.Module):
    """The token table, frozen in the compute dtype, or trained in float32."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Inner(nn.Module):
    """What Hugging Face calls ``model``: everything but the head."""

    def __init__(self, spec: specs.ModelSpec, take: Take, ops: Ops) -> None:
        super().__init__()
        assert spec.norm is not None
        self.embed_tokens = Embedding(_dense(take(f"{EMBEDDING}.weight")))
        self.layers = nn.ModuleList(Block(spec, index, take, ops) for index in range(len(spec.layers)))
        self.norm = RMSNorm(spec.norm, FINAL_NORM, take, ops)


class Decoder(nn.Module):
    """A language model. take(name) hands over each base tensor once, on the device, in its final dtype or as NF4."""

    def __init__(self, spec: specs.ModelSpec, take: Take, ops: Ops, dtype: torch.dtype, recompute: bool) -> None:
        super().__init__()
        check_buildable(spec, "torch")
        self.spec, self.dtype, self.ops, self._recompute = spec, dtype, ops, recompute
        self.model = Inner(spec, take, ops)
        self.lm_head = self.model.embed_tokens if spec.head.tied else Embedding(_dense(take(f"{LM_HEAD}.weight")))
        self._frequencies: dict[Any, tuple[torch.Tensor, float]] = {}

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def linears(self) -> list[Linear]:
        """The linear layers of the blocks, in the model's order."""
        return [module for module in self.model.layers.modules() if isinstance(module, Linear)]

    def rope_tables(self, positions: torch.Tensor, length: int) -> dict[specs.Rope, tuple[torch.Tensor, torch.Tensor]]:
        """(cos, sin) of every rotary setting in the model. length: the longest sequence, which dynamic scaling looks at."""
        found = {}
        for rope in {layer.attention.rope for layer in self.spec.layers}:
            if rope is not None:
                frequencies, scaling = self.inverse_frequencies(rope, length)
                found[rope] = tables(positions, frequencies, scaling)
        return found

    def inverse_frequencies(self, rope: specs.Rope, length: int) -> tuple[torch.Tensor, float]:
        """(a rotary setting's frequencies on the device, its scaling)."""
        stretches = rope.scaling is not None and rope.scaling.kind in ("dynamic", "longrope")
        key = (rope, length if stretches else None)
        if key not in self._frequencies:
            values, scaling = models_rope.inverse_frequencies(rope, max_positions=self.spec.max_positions, length=length)
            self._frequencies[key] = torch.tensor(values, dtype=torch.float32, device=self.device), scaling
        return self._frequencies[key]

    def hidden(self, input_ids: torch.Tensor, context: Context) -> torch.Tensor:
        """Final hidden states ``[batch, length, hidden]``, normed."""
        x = nn.functional.embedding(input_ids, self.model.embed_tokens.weight).to(self.dtype)
        if self.spec.embedding.scale != 1.0:
            x = x * torch.tensor(self.spec.embedding.scale, dtype=self.dtype, device=x.device)
        if context.noise is not None:
            x = x + context.noise.to(self.dtype)
        for block in self.model.layers:
            if self._recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 ``[..., vocab]``."""
        logits = nn.functional.linear(hidden, self.lm_head.weight.to(hidden.dtype)).float()
        cap = self.spec.head.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(
        self,
        input_ids: torch.Tensor,
        context: Context,
        targets: torch.Tensor,
        chosen: torch.Tensor,
        per_token: bool = False,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """The cross-entropy of the positions `chosen` (indices into the flat batch: those with a target), summed or each."""
        hidden = self.hidden(input_ids, context).flatten(0, 1).index_select(0, chosen)
        weight = self.lm_head.weight.to(self.dtype)
        targets, cap = targets.flatten().index_select(0, chosen), self.spec.head.soft_cap
        return self.ops.linear_cross_entropy(
            hidden, weight, targets, soft_cap=cap, per_token=per_token, label_smoothing=label_smoothing
        )
