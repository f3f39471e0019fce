"""The decoder's tree of modules under Hugging Face names: embedding, blocks, final norm, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from jaxsloth.kernels.rope.torch_ops import tables
from jaxsloth.models import rope as models_rope
from jaxsloth.models import spec as specs
from jaxsloth.models.buildable import check_buildable
from jaxsloth.models.names import EMBEDDING, FINAL_NORM, LM_HEAD, layer_linears, layer_prefix
from jaxsloth.torch_backend.attention import Attention
from jaxsloth.torch_backend.block import Block
from jaxsloth.torch_backend.embedding import Embedding
from jaxsloth.torch_backend.head import Head
from jaxsloth.torch_backend.linear import Linear, LinearGroup
from jaxsloth.torch_backend.mlp import Mlp
from jaxsloth.torch_backend.norm import RMSNorm
from jaxsloth.torch_backend.ops import Ops
from jaxsloth.torch_backend.run import Tables
from jaxsloth.torch_backend.weights import GetWeight, dense

BODIES = {specs.Attention: Attention, specs.Mlp: Mlp}


def make_block(spec: specs.ModelSpec, index: int, get_weight: GetWeight, ops: Ops) -> Block:
    prefix, linears = layer_prefix(index), layer_linears(spec, index)

    def make_norm(norm: specs.Norm, name: str) -> RMSNorm:
        return RMSNorm(norm, f"{prefix}.{name}", get_weight, ops)

    def make_body(branch: specs.Branch) -> nn.Module:
        name = f"{prefix}.{branch.name}"
        own = tuple(linear for linear in linears if linear.name.startswith(f"{name}."))
        return BODIES[type(branch.body)](branch.body, name, index, own, get_weight, ops)  # type: ignore[arg-type]

    return Block(spec.layers[index], make_norm, make_body)


class Inner(nn.Module):
    """Hugging Face's ``model``: everything but the head."""

    def __init__(self, spec: specs.ModelSpec, get_weight: GetWeight, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        assert spec.norm is not None
        self.embed_tokens = Embedding(spec.embedding, dense(get_weight(f"{EMBEDDING}.weight")), dtype)
        self.layers = nn.ModuleList(make_block(spec, index, get_weight, ops) for index in range(len(spec.layers)))
        self.norm = RMSNorm(spec.norm, FINAL_NORM, get_weight, ops)


class Decoder(nn.Module):
    """A language model. get_weight(name) hands over each base tensor once, on the device, in its final dtype or as NF4.

    recompute: passes under autograd keep the blocks' inputs only.
    """

    def __init__(self, spec: specs.ModelSpec, get_weight: GetWeight, ops: Ops, dtype: torch.dtype, recompute: bool) -> None:
        super().__init__()
        check_buildable(spec, "torch")
        self.spec, self.dtype, self.ops, self.recompute = spec, dtype, ops, recompute
        self.model = Inner(spec, get_weight, ops, dtype)
        own = None if spec.head.tied else dense(get_weight(f"{LM_HEAD}.weight"))
        self.lm_head = Head(spec.head, own, self.model.embed_tokens, ops)
        self._frequencies: dict[Any, tuple[torch.Tensor, float]] = {}

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def blocks(self) -> list[Block]:
        return list(self.model.layers)  # type: ignore[arg-type]

    def linears(self) -> list[Linear]:
        """The linear layers of the blocks, in the model's order."""
        return [module for module in self.model.layers.modules() if isinstance(module, Linear)]

    def groups(self) -> list[LinearGroup]:
        """The groups of linear layers that share an input, in the order of the forward pass."""
        return [group for block in self.blocks for branch in block.branches for group in branch.body.groups().values()]

    def rope_tables(self, positions: torch.Tensor, length: int) -> Tables:
        """(cos, sin) of every rotary setting in the model. length: the longest sequence, which dynamic scaling looks at."""
        found = {}
        for rope in {layer.attention.rope for layer in self.spec.layers}:
            if rope is not None:
                frequencies, scaling = self._inverse_frequencies(rope, length)
                found[rope] = tables(positions, frequencies, scaling)
        return found

    def _inverse_frequencies(self, rope: specs.Rope, length: int) -> tuple[torch.Tensor, float]:
        """(a rotary setting's frequencies on the device, its scaling)."""
        stretches = rope.scaling is not None and rope.scaling.kind in ("dynamic", "longrope")
        key = (rope, length if stretches else None)
        if key not in self._frequencies:
            values, scaling = models_rope.inverse_frequencies(rope, max_positions=self.spec.max_positions, length=length)
            self._frequencies[key] = torch.tensor(values, dtype=torch.float32, device=self.device), scaling
        return self._frequencies[key]
