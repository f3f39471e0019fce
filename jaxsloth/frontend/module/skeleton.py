"""Modules with Hugging Face names and no weights: what PEFT wraps and trainers count, while a backend computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from jaxsloth.frontend.module.placeholders import Placeholders, SharedWeight
from jaxsloth.models.names import EMBEDDING, FINAL_NORM, LM_HEAD, linears, norms
from jaxsloth.models.spec import ModelSpec


class PlaceholderModule(nn.Module):
    """A module that can't be run, moved or cast: its weights are elsewhere. shared: its weight is the backend's own memory.
    whole: makes the module that is trained in its place, where one can be. called: the layer that it stands for."""

    shared = False
    called = ""
    whole: Callable[[], nn.Module] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> PlaceholderModule:
        return self

    def __deepcopy__(self, memo: Any) -> nn.Module:
        """A leaf of its own over the same weights: copies of a placeholder would be as large as the real thing.

        Who copies the leaf alone, as PEFT's modules_to_save does, is about to train it: what comes then has weights.
        """
        if self.whole is not None and not memo:
            return self.whole()
        twin = type(self).__new__(type(self))
        twin.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in self.__dict__.items()}
        return twin

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        raise RuntimeError(
            f"a {type(self).__name__} holds no weights and can't be run by itself, as prompt tuning does; call the whole model"
        )


class PlaceholderLinear(PlaceholderModule, nn.Linear):
    """`nn.Linear` to those who ask (PEFT's "all-linear" does)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias

    def __deepcopy__(self, memo: Any) -> nn.Module:
        twin = super().__deepcopy__(memo)
        if isinstance(twin, PlaceholderLinear):  # one's bias is trained without the other's
            twin.bias = copy.deepcopy(self.bias, memo)
        return twin


class PlaceholderEmbedding(PlaceholderModule, nn.Embedding):
    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = weight


class PlaceholderNorm(PlaceholderModule):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def fill(backbone: nn.Module, spec: ModelSpec, placeholders: Placeholders) -> None:
    """Adds to `backbone` what Hugging Face calls ``model``: embedding, blocks and norm, all placeholders."""
    prefix = EMBEDDING.partition(".")[0]

    def put(name: str, leaf: PlaceholderModule) -> None:
        leaf.called = name
        _put(backbone, name.removeprefix(f"{prefix}."), leaf)

    put(EMBEDDING, PlaceholderEmbedding(placeholders.parameter(f"{EMBEDDING}.weight", spec.embedding.vocab, spec.hidden)))
    backbone.add_module("layers", nn.ModuleList(nn.Module() for _ in spec.layers))
    for linear in linears(spec):
        weight = placeholders.parameter(f"{linear.name}.weight", linear.out_features, linear.in_features)
        bias = placeholders.bias(f"{linear.name}.bias", linear.out_features) if linear.bias else None
        put(linear.name, PlaceholderLinear(weight, bias))
    widths = {name: width for index in range(len(spec.layers)) for name, (_, width) in norms(spec, index).items()}
    for name, width in {**widths, FINAL_NORM: spec.hidden}.items():
        put(name, PlaceholderNorm(placeholders.parameter(f"{name}.weight", width)))


def head(weight: torch.Tensor) -> PlaceholderLinear:
    """The output layer over the backend's own memory: trainers that fuse the loss with the head read its weight."""
    layer = PlaceholderLinear(SharedWeight(weight, requires_grad=False))
    layer.shared, layer.called = True, LM_HEAD
    return layer


def tie(embedding: PlaceholderEmbedding, output: PlaceholderLinear) -> None:
    embedding.weight, embedding.shared = output.weight, True


def _put(root: nn.Module, path: str, leaf: nn.Module) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(root, owner):
            root.add_module(owner, nn.Module())
        root = getattr(root, owner)
    root.add_module(name, leaf)
