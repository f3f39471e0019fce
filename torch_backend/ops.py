"""The implementations of the ops that the registry chose for one device and dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from jaxsloth.kernels.attention.contract import ATTENTION
from jaxsloth.kernels.attention.contract import sizes_of as attention_sizes
from jaxsloth.kernels.gated_activation.contract import GATED_ACTIVATION
from jaxsloth.kernels.linear_cross_entropy.contract import LINEAR_CROSS_ENTROPY
from jaxsloth.kernels.lora_dropout.contract import LORA_DROPOUT
from jaxsloth.kernels.lora_matmul.contract import LORA_MATMUL
from jaxsloth.kernels.nf4.contract import DEQUANTIZE
from jaxsloth.kernels.registry import Implementation, Op, Target, select
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from jaxsloth.kernels.rope.contract import ROPE
from jaxsloth.models import spec as specs

OPS = (ATTENTION, GATED_ACTIVATION, LINEAR_CROSS_ENTROPY, LORA_DROPOUT, LORA_MATMUL, RMS_NORM, ROPE)


class Ops:
    """The implementation of every op for one device and dtype, chosen once."""

    def __init__(self, target: Target, requested: Mapping[str, str]) -> None:
        def choose(op: Op) -> Callable[..., Any]:
            self.chosen[op.name] = select(op, "torch", target, requested.get(op.name)).implementation
            return self.chosen[op.name].load()

        self.chosen: dict[str, Implementation] = {}  # by the op's name
        self.gated_activation = choose(GATED_ACTIVATION)
        self.linear_cross_entropy = choose(LINEAR_CROSS_ENTROPY)
        choose(LORA_DROPOUT)  # whose module written products take
        self.lora_matmul = choose(LORA_MATMUL)
        self.nf4_dequantize = choose(DEQUANTIZE)
        self.rms_norm = choose(RMS_NORM)
        self.rope = choose(ROPE)
        self._target, self._attention = target, requested.get(ATTENTION.name)

    def attention(self, spec: specs.Attention) -> Implementation:
        """The implementation for one layer's attention."""
        target = replace(self._target, sizes=attention_sizes(spec.head_dim, spec.soft_cap))
        return select(ATTENTION, "torch", target, self._attention).implementation

    @cached_property
    def kernels(self) -> Kernels:
        return Kernels.of(self)


@dataclass(frozen=True)
class Kernels:
    """The modules of the implementations that the registry chose, whose functions work on a pass' own buffers."""

    norm: ModuleType
    rope: ModuleType
    activation: ModuleType
    weights: ModuleType  # `AdapterCopy` and `dequantize_into`
    loss: ModuleType  # `softmax`
    dropout: ModuleType  # `project`, `input_gradient`, `gradient_a`

    @staticmethod
    def of(ops: Ops) -> Kernels:
        if ops.chosen["nf4_dequantize"].name == "triton":
            from jaxsloth.kernels.lora_matmul import triton_kernel as weights
        else:
            from jaxsloth.kernels.lora_matmul import extended as weights
        names = ("rms_norm", "rope", "gated_activation")
        norm, rope, activation = (ops.chosen[name].module() for name in names)
        loss, dropout = (ops.chosen[name].module() for name in ("linear_cross_entropy", "lora_dropout"))
        return Kernels(norm, rope, activation, weights, loss, dropout)
