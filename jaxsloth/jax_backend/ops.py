"""The implementation of every op for one device and dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from jaxsloth.kernels.attention.contract import ATTENTION
from jaxsloth.kernels.attention.contract import sizes_of as attention_sizes
from jaxsloth.kernels.gated_activation.contract import GATED_ACTIVATION
from jaxsloth.kernels.linear_cross_entropy.contract import LINEAR_CROSS_ENTROPY
from jaxsloth.kernels.lora_matmul.contract import LORA_MATMUL
from jaxsloth.kernels.nf4.contract import MATVEC, MATVEC_ROWS
from jaxsloth.kernels.registry import Implementation, Op, RefusedError, Target, all_ops, resolve, select
from jaxsloth.kernels.rms_norm.contract import RMS_NORM
from jaxsloth.kernels.rope.contract import ROPE
from jaxsloth.models import spec as specs

# Ops for which a request is followed: here, in the optimizer, and at every attention and matvec.
FOLLOWED = frozenset(
    ("gated_activation", "linear_cross_entropy", "lora_matmul", "rope", "rms_norm", "attention", "nf4_matvec", "adamw_8bit")
)


def _check_others(target: Target, requested: Mapping[str, str]) -> None:
    """Refuses a request that nothing here would follow: for an implementation other than the one that runs anyway.

    Raises:
        RefusedError: there is one.
    """
    for op in all_ops():
        asked = requested.get(op.name)
        if asked is None or op.name in FOLLOWED:
            continue
        select(op, "jax", target, asked)
        runs = select(op, "jax", target).implementation.name
        if asked != runs:
            raise RefusedError(
                f"op {op.name} runs as {runs!r} on JAX here, whatever is asked for, and got a request for {asked!r}"
            )


class Ops:
    """The implementation of every op for one device and dtype, chosen once. requested: those asked for by name."""

    def __init__(self, target: Target, requested: Mapping[str, str]) -> None:
        def choose(op: Op) -> Callable[..., Any]:
            return resolve(op, "jax", target, requested.get(op.name))

        _check_others(target, requested)
        self.dtype = target.dtype
        self.gated_activation = choose(GATED_ACTIVATION)
        self.linear_cross_entropy = choose(LINEAR_CROSS_ENTROPY)
        self.lora_matmul = choose(LORA_MATMUL)
        self.rope = choose(ROPE)
        self._rms_norm = choose(RMS_NORM)
        # For as many rows as a matvec takes: XLA joins their norm, residual sum and weight's slice (docs/performance.md).
        self._rms_norm_of_few = resolve(RMS_NORM, "jax", target, requested.get(RMS_NORM.name, "xla"))
        self._target, self._requested = target, dict(requested)

    def rms_norm(self, x: Any, weight: Any, **options: Any) -> Any:
        few = x.size <= MATVEC_ROWS * x.shape[-1]
        return (self._rms_norm_of_few if few else self._rms_norm)(x, weight, **options)

    def attention(self, spec: specs.Attention) -> Implementation:
        """Which one depends on the layer."""
        target = replace(self._target, sizes=attention_sizes(spec.head_dim, spec.soft_cap))
        return select(ATTENTION, "jax", target, self._requested.get(ATTENTION.name)).implementation

    def matvec(self, rows: int, shape: tuple[int, int]) -> Callable[..., Any] | None:
        """nf4_matvec for x of so many rows and a weight of this shape; None where `lora_matmul` does no worse."""
        sizes = {"rows": rows, "in": shape[1], "values": shape[0] * shape[1]}
        requested = self._requested.get(MATVEC.name)
        chosen = select(MATVEC, "jax", replace(self._target, sizes=sizes), requested).implementation
        return None if chosen.name == "xla" and requested is None else chosen.load()

    def asked_otherwise(self, *names: str) -> str | None:
        """Why kernels that are written with Pallas can't stand for the ops of these names: another implementation was asked
        for. None where none was."""
        for name in names:
            if self._requested.get(name, "pallas") != "pallas":
                return f"{name}: {self._requested[name]} was asked for"
        return None

    def asked_for(self, name: str) -> bool:
        """Whether an implementation of the op was asked for by name."""
        return name in self._requested
