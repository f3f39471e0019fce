"""All blocks for training, forward and backward written out.

What is kept for the backward is said by blocks and bodies instead of being found by tracing, by mode:

    none       the stream before each branch, the bodies' inputs, and all that they need
    selective  the stream, and what is dear to form again (q, k, v, attention's output and statistics)
    offload    the same, in pinned host memory, fetched a layer ahead
    full       the stream, attention's output and statistics

In every mode the products with A are kept too. A body that has no written pair for what is asked of it takes a local vjp of its
`forward` (`body.DefaultPair`); the others stay written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.block import Block
from jaxsloth.jax_backend.linear import TRAINED, pad_columns
from jaxsloth.jax_backend.offload import to_device, to_host
from jaxsloth.jax_backend.run import Run
from jaxsloth.kernels.jax_platform import platform


@dataclass(frozen=True)
class StackConfig:
    """What is fixed about a pass: the blocks of a period without their arrays, how often they repeat, and how.

    trains_below: the gradient of the stream before the first block is wanted.
    """

    structure: Any
    count: int
    mode: str
    unrolled: bool
    trains_below: bool

    @property
    def offloads(self) -> bool:
        return self.mode == "offload" and platform() == "cuda"

    def blocks(self, own: Any, frozen: Any) -> list[Block]:
        return list(nnx.merge(self.structure, own, frozen))


def describe(layers: Sequence[Block], count: int) -> list[str]:
    """A line a kind of block on how it is trained, for logs: "4 blocks: self_attn: written; mlp: local vjp (a reason)"."""

    def ways(block: Block) -> str:
        passes = block.passes().items()
        return "; ".join(f"{name}: {'written' if reason is None else f'local vjp ({reason})'}" for name, reason in passes)

    return [f"{stacks * count} blocks: {kind}" for kind, stacks in Counter(map(ways, layers)).items()]


def stream(layers: Any, x: Any, run: Run, count: int, mode: str, unrolled: bool, trains_below: bool) -> Any:
    """The residual stream ``[tokens, hidden]`` behind all blocks, from that before them.

    layers: one stack of blocks a place in the period, which is repeated `count` times. mode: `gradient_checkpointing`.
    unrolled: the layers one after the other, a program as long as the model is deep that stacks and slices nothing, instead of
    a scan.
    """
    structure, trained, frozen = nnx.split(layers, TRAINED, ...)
    return _stack(StackConfig(structure, count, mode, unrolled, trains_below), trained, x, frozen, run)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stack(config: StackConfig, trained: Any, x: Any, frozen: Any, run: Run) -> Any:
    return _forward(config, trained, x, frozen, run, None)[0]


def _forward(config: StackConfig, trained: Any, x: Any, frozen: Any, run: Run, mode: str | None) -> tuple[Any, Any]:
    """(the stream, what is kept of every repetition of the period); mode None keeps nothing."""
    leave = to_host if config.offloads and mode else lambda kept: kept
    if config.unrolled:
        delta, every = None, []
        for index in range(config.count):
            own = _select(trained, index)
            x, delta, kept = _period_forward(config, mode, x, delta, jnp.int32(index), own, frozen, run)
            every.append(leave(kept))
        return x + delta, every

    def body(carried: Any, scanned: Any) -> tuple[Any, Any]:
        x, delta, kept = _period_forward(config, mode, *carried, *scanned, frozen, run)
        return (x, delta), leave(kept)

    (x, delta), kept = jax.lax.scan(body, (x, jnp.zeros_like(x)), (jnp.arange(config.count, dtype=jnp.int32), trained))
    return x + delta, kept


# A function of its own under jit, both of them: layers that follow one another are traced and lowered once instead of each
# (XLA puts them into the program before it optimizes anything).
@partial(jax.jit, static_argnums=(0, 1))
def _period_forward(
    config: StackConfig, mode: str | None, x: Any, delta: Any, index: Any, own: Any, frozen: Any, run: Run
) -> tuple[Any, Any, Any]:
    """(the stream before the last branch, that branch's output, what each block keeps) of one repetition of the period."""
    kept = []
    for block in config.blocks(own, frozen):
        x, delta, saved = block.forward_keeping(x, delta, run.at(index), mode)
        kept.append(saved)
    return x, delta, tuple(kept)


@partial(jax.jit, static_argnums=(0,))
def _period_backward(config: StackConfig, d: Any, index: Any, own: Any, kept: Any, frozen: Any, run: Run) -> tuple[Any, Any]:
    """(the gradient of the stream before the period, those of what it trains)."""
    if config.mode != "none":
        # Nothing is formed again before its gradient has come: else it would be kept after all.
        kept, d = jax.lax.optimization_barrier((kept, d))
    found = {}
    for place, block in reversed(list(enumerate(config.blocks(own, frozen)))):
        d, gradients = block.backward(d, kept[place], run.at(index))
        found |= {f"{place}.{name}": gradient for name, gradient in gradients.items()}
    flat = [(path, leaf.replace(found[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(own)]
    return d, nnx.from_flat_state(flat)


def _select(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda stack: stack[index], tree)


def _stack_forward(config: StackConfig, trained: Any, x: Any, frozen: Any, run: Run) -> tuple[Any, Any]:
    out, kept = _forward(config, trained, x, frozen, run, config.mode)
    return out, (trained, frozen, run, kept)


def _stack_backward(config: StackConfig, residuals: Any, d: Any) -> tuple[Any, ...]:
    trained, frozen, run, kept = residuals
    hidden = d.shape[1]
    d = pad_columns(d, run.stream_pad)

    if not config.unrolled:

        def body(d: Any, scanned: Any) -> tuple[Any, Any]:
            index, own, saved = scanned
            return _period_backward(config, d, index, own, to_device(saved) if config.offloads else saved, frozen, run)

        scanned = jnp.arange(config.count, dtype=jnp.int32), trained, kept
        d, gradients = jax.lax.scan(body, d, scanned, reverse=True)
        return gradients, d[:, :hidden] if config.trains_below else None, None, None

    every: list[Any] = [None] * config.count
    coming = to_device(kept[-1]) if config.offloads else kept[-1]
    for index in reversed(range(config.count)):
        saved = coming
        if index:
            coming = kept[index - 1]
            if config.offloads:
                coming, d = jax.lax.optimization_barrier((coming, d))
                coming = to_device(coming)
        own = _select(trained, index)
        d, every[index] = _period_backward(config, d, jnp.int32(index), own, saved, frozen, run)
    gradients = jax.tree.map(lambda *parts: jnp.stack(parts), *every)
    return gradients, d[:, :hidden] if config.trains_below else None, None, None


_stack.defvjp(_stack_forward, _stack_backward)
