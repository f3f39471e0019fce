"""Modules with Hugging Face names and no weights: what PEFT wraps and trainers count, while a backend computes.

A placeholder weight has the shape, dtype and device of the real one, and one element of storage. It is NaN, so that whatever
computes with it shows, and the NaN's payload comes of the base's fingerprint, so that who hashes a state_dict (TRL, to reuse
reference log-probabilities) tells two bases apart. Writing into one raises, since its elements share their memory.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from jaxsloth.models.names import EMBEDDING, FINAL_NORM, linears, norms
from jaxsloth.models.spec import ModelSpec

# The bits of a quiet NaN of each dtype, and how many bits of payload it takes.
_NAN = {
    torch.float32: (torch.int32, 0x7FC00000, 22),
    torch.bfloat16: (torch.int16, 0x7FC0, 6),
    torch.float16: (torch.int16, 0x7E00, 9),
}


class HollowBias(nn.Parameter):
    """A placeholder that becomes a plain parameter with the base's values, float32, once it is to be trained.

    PEFT marks the biases that it trains (bias="all", "lora_only") by requires_grad and by nothing else, and who makes an
    optimizer next must find them whole: so this is where it happens. base: makes the values.
    """

    base: Callable[[], torch.Tensor]

    @classmethod
    def over(cls, placeholder: torch.Tensor, base: Callable[[], torch.Tensor]) -> HollowBias:
        made = cls(placeholder, requires_grad=False)
        made.base = base
        return made

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return False

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        if trained:
            self.data = self.base()
            del self.base
            self.__class__ = nn.Parameter  # type: ignore[assignment]  (as torch's own lazy parameters do)
            self.requires_grad = True

    def requires_grad_(self, requires_grad: bool = True) -> HollowBias:
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: Any) -> HollowBias:
        return HollowBias.over(self.data, self.base)


class Placeholders:
    """Makes the parameters of one model's skeleton. base: a tensor of the base by name, float32, in memory of its own."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, fingerprint: bytes, base: Callable[[str], torch.Tensor]
    ) -> None:
        self._dtype, self._device, self._fingerprint, self._base = dtype, device, fingerprint, base

    def bias(self, name: str, width: int) -> HollowBias:
        return HollowBias.over(self.parameter(name, width).data, partial(self._base, name))

    def parameter(self, name: str, *shape: int) -> nn.Parameter:
        integers, bits, width = _NAN[self._dtype]
        digest = hashlib.sha256(self._fingerprint + name.encode()).digest()
        payload = int.from_bytes(digest[:4], "little") & ((1 << width) - 1)
        element = torch.tensor([bits | payload], dtype=integers).view(self._dtype).to(self._device)
        return nn.Parameter(element.expand(shape), requires_grad=False)


class Hollow(nn.Module):
    """A module that can't be run, moved or cast: its weights are elsewhere. shared: its weight is the backend's own memory.
    whole: makes the module that is trained in its place, where one can be."""

    shared = False
    whole: Callable[[], nn.Module] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> Hollow:
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


class HollowLinear(Hollow, nn.Linear):
    """`nn.Linear` to those who ask (PEFT's "all-linear" does)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias

    def __deepcopy__(self, memo: Any) -> nn.Module:
        twin = super().__deepcopy__(memo)
        if isinstance(twin, HollowLinear):  # one's bias is trained without the other's
            twin.bias = copy.deepcopy(self.bias, memo)
        return twin


class HollowEmbedding(Hollow, nn.Embedding):
    def __init__(self, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = weight


class HollowNorm(Hollow):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def fill(backbone: nn.Module, spec: ModelSpec, hollow: Placeholders) -> None:
    """Adds to `backbone` what Hugging Face calls ``model``: embedding, blocks and norm, all hollow."""
    prefix, _, embedding = EMBEDDING.partition(".")
    backbone.add_module(embedding, HollowEmbedding(hollow.parameter(f"{EMBEDDING}.weight", spec.embedding.vocab, spec.hidden)))
    backbone.add_module("layers", nn.ModuleList(nn.Module() for _ in spec.layers))
    for linear in linears(spec):
        weight = hollow.parameter(f"{linear.name}.weight", linear.out_features, linear.in_features)
        bias = hollow.bias(f"{linear.name}.bias", linear.out_features) if linear.bias else None
        _put(backbone, linear.name.removeprefix(f"{prefix}."), HollowLinear(weight, bias))
    widths = {name: width for index in range(len(spec.layers)) for name, (_, width) in norms(spec, index).items()}
    for name, width in {**widths, FINAL_NORM: spec.hidden}.items():
        _put(backbone, name.removeprefix(f"{prefix}."), HollowNorm(hollow.parameter(f"{name}.weight", width)))


def head(weight: torch.Tensor) -> HollowLinear:
    """The output layer over the backend's own memory: trainers that fuse the loss with the head read its weight."""
    layer = HollowLinear(nn.Parameter(weight, requires_grad=False))
    layer.shared = True
    return layer


def tie(embedding: HollowEmbedding, output: HollowLinear) -> None:
    embedding.weight, embedding.shared = output.weight, True


def _put(root: nn.Module, path: str, leaf: nn.Module) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(root, owner):
            root.add_module(owner, nn.Module())
        root = getattr(root, owner)
    root.add_module(name, leaf)
