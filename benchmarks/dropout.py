"""What do LoRA dropout's products cost?  ``python -m benchmarks.dropout --backend torch --shape 8b --batch 4 --length 2048``

Milliseconds of each product for every group of linear layers that share an input, and over a whole step (times the layers).
``--sweep`` tries other tiles; the winners go into PROJECT, INPUT and GRADIENT of kernels/lora_dropout. What a user's step costs
with and without dropout is `benchmarks.cliffs --rows golden,dropout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import ModuleType
from typing import Annotated, Any

import typer

from benchmarks.ops import best_ms
from benchmarks.shapes import shape_spec
from jaxsloth.kernels.dropout.contract import module_word
from jaxsloth.kernels.lora_dropout.contract import Masks
from jaxsloth.kernels.lora_matmul.contract import pad_for
from jaxsloth.models.names import layer_linears

PRODUCTS = {"project": "PROJECT", "input_gradient": "INPUT", "gradient_a": "GRADIENT"}
Run = Callable[[str, Any], Any]


def groups_of(shape: str) -> Iterator[tuple[str, int, int]]:
    """(name, in, modules) of each group of linear layers that share an input."""
    linears = {linear.name.rpartition(".")[2]: linear for linear in layer_linears(shape_spec(shape), 0)}
    for name, members in {"q k v": 3, "o": 1, "gate up": 2, "down": 1}.items():
        yield name, linears[f"{name.split()[0]}_proj"].in_features, members


def candidates(chosen: Any) -> Iterator[Any]:
    """The chosen tiles, then others."""
    yield chosen
    for tokens, counters, warps, stages in product((32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3)):
        if tokens * counters in (1024, 2048, 4096):
            yield chosen._replace(tokens=tokens, counters=counters, warps=warps, stages=stages)
    for programs in (396, 1584, 3168):
        yield chosen._replace(programs=programs)


def main(
    backend: Annotated[str, typer.Option(help="torch or jax")] = "torch",
    shape: str = "8b",
    batch: int = 4,
    length: int = 2048,
    rank: int = 16,
    sweep: Annotated[bool, typer.Option(help="try other tiles")] = False,
) -> None:
    layers, total = len(shape_spec(shape).layers), 0.0
    for name, channels, members in groups_of(shape):
        module, run = (_torch if backend == "torch" else _jax)(channels, members, batch, length, rank)
        for which, constant in PRODUCTS.items():
            chosen = getattr(module, constant)
            for tiles in candidates(chosen) if sweep else (chosen,):
                what = f"{name:8} {which:15} {tuple(tiles) if sweep else ''}"
                try:
                    found = run(which, tiles)
                except Exception as error:
                    print(f"{'failed':>9}  {what}: {str(error).splitlines()[0][:100]}", flush=True)
                    continue
                total += found if tiles == chosen else 0.0
                print(f"{found:9.4f} ms  {what}", flush=True)
    print(f"{total * layers:9.2f} ms  a step of {layers} layers, {batch} x {length} tokens", flush=True)


def _torch(channels: int, members: int, batch: int, length: int, rank: int) -> tuple[ModuleType, Run]:
    import torch

    from jaxsloth.kernels.lora_dropout import triton_kernel as module

    words = torch.tensor([module_word(str(member)) for member in range(members)], device="cuda")
    rows, key = torch.arange(batch, dtype=torch.int32, device="cuda"), torch.tensor([1, 2], device="cuda")
    masks = Masks(0.05, key, words, (rank,) * members, rows, length)
    pad, tokens = pad_for(masks.rank), batch * length
    half = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    x, a, g, dx = half(tokens, channels + pad), half(pad, channels), half(tokens, pad), half(tokens, channels)
    totals = torch.zeros(masks.rank, channels, device="cuda").split(rank)

    def run(which: str, tiles: Any) -> float:
        calls = {
            "project": lambda: module.project(x, a, masks, out=x[:, channels:], tiles=tiles),
            "input_gradient": lambda: module.input_gradient(dx, g, a, masks, tiles=tiles),
            "gradient_a": lambda: module.gradient_a(g, x, masks, totals, tiles=tiles),
        }
        return best_ms(calls[which], lambda _: torch.cuda.synchronize())

    return module, run


def _jax(channels: int, members: int, batch: int, length: int, rank: int) -> tuple[ModuleType, Run]:
    import jax
    import jax.numpy as jnp

    from jaxsloth.kernels.lora_dropout import pallas_kernel as module
    from jaxsloth.kernels.lora_dropout import xla_ops  # makes Masks a pytree

    del xla_ops
    words = jnp.array([module_word(str(member)) for member in range(members)], jnp.uint32)
    key, rows = jnp.array([1, 2], jnp.uint32), jnp.arange(batch, dtype=jnp.int32)
    masks = Masks(0.05, key, words, (rank,) * members, rows, length)
    pad, tokens = pad_for(masks.rank), batch * length
    shapes = (tokens, channels + pad), (pad, channels), (tokens, pad), (tokens, channels)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, a, g, dx = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

    def run(which: str, tiles: Any) -> float:
        calls = {
            "project": lambda x, a, g, dx, masks: module.project(x, a, masks, tiles=tiles),
            "input_gradient": lambda x, a, g, dx, masks: module.input_gradient(dx, g, a, masks, tiles=tiles),
            "gradient_a": lambda x, a, g, dx, masks: module.gradient_a(g, x, masks, channels, tiles=tiles),
        }
        # input_gradient copies dx here, which a step whose dx is not used again does not.
        work = jax.jit(calls[which])
        return best_ms(lambda: work(x, a, g, dx, masks), jax.block_until_ready)

    return module, run


if __name__ == "__main__":
    typer.run(main)
