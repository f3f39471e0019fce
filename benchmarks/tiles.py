"""Which tiles suit a kernel on this GPU?  ``python -m benchmarks.tiles flash --backend torch --head-dim 256 --window 4096``

Prints milliseconds a candidate: of attention with a soft cap in both frameworks (`flash`), of the loss's softmax in JAX
(`softmax`), and of the products that decoding an 8B model takes (`matvec`). The winners go into flash_triton.HALF,
pallas_flash.HALF, linear_cross_entropy's pallas_kernel, and `tiles_for` of matvec_triton and pallas_matvec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Annotated, Any

import typer

from benchmarks.ops import best_ms

HEADS, KV_HEADS = 16, 8
PARTS = ("forward", "dq", "dkv")
app = typer.Typer()


def candidates(part: str) -> Iterator[tuple[int, int, int, int]]:
    """(queries, keys, warps, stages)."""
    queries, keys = ((32, 64), (64, 128)) if part == "dkv" else ((64, 128), (32, 64, 128))
    yield from product(queries, keys, (4, 8), (1, 2, 3))


@app.command()
def flash(
    backend: Annotated[str, typer.Option(help="torch or jax")] = "torch",
    head_dim: int = 128,
    batch: int = 4,
    length: int = 2048,
    window: int | None = None,
    packed: Annotated[bool, typer.Option(help="documents of 180 tokens")] = False,
) -> None:
    """Times forward, and both ways with other tiles for one of the backward's kernels at a time."""
    module, run = (_torch_flash if backend == "torch" else _jax_flash)(head_dim, batch, length, window, packed)
    chosen = list(module.HALF[max(1 << (head_dim - 1).bit_length(), 64)])
    for place, part in enumerate(PARTS):
        for sizes in candidates(part):
            tiles = (*chosen[:place], module.Tiles(*sizes), *chosen[place + 1 :])
            _line(f"{part:8} {module.Tiles(*sizes)}", partial(run, tiles, part != "forward"))


def _line(what: str, measure: Callable[[], float]) -> None:
    try:
        print(f"{measure():9.3f} ms  {what}", flush=True)
    except Exception as error:
        print(f"{'failed':>12}  {what}: {str(error).splitlines()[0][:100]}", flush=True)


def _torch_flash(head_dim: int, batch: int, length: int, window: int | None, packed: bool) -> tuple[Any, Callable[..., float]]:
    import torch

    from jaxsloth.kernels.attention import flash_triton

    segments = (torch.arange(length, device="cuda", dtype=torch.int32) // 180 + 1).repeat(batch, 1) if packed else None
    mask = flash_triton.MaskSpec(head_dim**-0.5, True, window, 50.0, segments)
    q, k, v = (
        torch.randn(batch, length, n, head_dim, device="cuda", dtype=torch.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS)
    )

    def run(tiles: tuple[Any, ...], both: bool) -> float:
        out, lse = flash_triton.forward(q, k, v, mask, tiles[0])

        def work() -> Any:
            if both:
                return flash_triton.backward(q, q, k, v, out, lse, mask, tiles[1:])
            return flash_triton.forward(q, k, v, mask, tiles[0])

        return best_ms(work, lambda _: torch.cuda.synchronize())

    return flash_triton, run


def _jax_flash(head_dim: int, batch: int, length: int, window: int | None, packed: bool) -> tuple[Any, Callable[..., float]]:
    import jax
    import jax.numpy as jnp

    from jaxsloth.kernels.attention import pallas_flash

    segments = jnp.tile(jnp.arange(length, dtype=jnp.int32) // 180 + 1, (batch, 1)) if packed else None
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (batch, length, n, head_dim), jnp.bfloat16)
        for key, n in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    )

    def run(tiles: tuple[Any, ...], both: bool) -> float:
        pallas_flash.tiles_for = lambda *_: tiles

        def forward(q: Any, k: Any, v: Any) -> Any:
            options = {"scale": head_dim**-0.5, "window": window, "soft_cap": 50.0, "q_segments": segments}
            return pallas_flash.attention(q, k, v, **options)

        def with_backward(q: Any, k: Any, v: Any) -> Any:
            out, pull = jax.vjp(forward, q, k, v)
            return pull(out)

        work = jax.jit(with_backward if both else forward)
        return best_ms(lambda: work(q, k, v), jax.block_until_ready)

    return pallas_flash, run


@app.command()
def softmax(rows: int = 256, vocab: int = 128256, soft_cap: float | None = None) -> None:
    """Times a chunk of the loss in JAX, with its gradient in bfloat16."""
    import jax
    import jax.numpy as jnp

    from jaxsloth.kernels.linear_cross_entropy import pallas_kernel

    logits = jax.random.normal(jax.random.key(0), (rows, vocab), jnp.float32)
    targets = jnp.arange(rows, dtype=jnp.int32)

    def run(size: int, warps: int) -> float:
        pallas_kernel.SIZE, pallas_kernel.WARPS = size, warps
        work = jax.jit(lambda logits: pallas_kernel.softmax(logits, targets, soft_cap, -100, jnp.bfloat16))
        return best_ms(lambda: work(logits), jax.block_until_ready)

    for size, warps in product((1024, 2048, 4096, 8192), (4, 8, 16)):
        _line(f"{size} columns, {warps} warps", partial(run, size, warps))


GROUPS = {
    "q k v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
LAYERS = 12  # one after the other, so that no weight is read from the cache


@app.command()
def matvec(backend: Annotated[str, typer.Option(help="torch or jax")] = "jax", rows: int = 8) -> None:
    """Times 24 products of each group of Llama-3.1-8B's layers, nested NF4 with `rows` rows of bfloat16."""
    if backend == "torch":
        from jaxsloth.kernels.nf4 import matvec_triton as module

        prepare = _torch_matvec
    else:
        from jaxsloth.kernels.nf4 import pallas_matvec as module

        prepare = _jax_matvec
    heights, widths, warps = ((2, 4, 8, 16), (8, 16, 32), (1, 2, 4)) if rows == 1 else ((16, 32, 64), (1, 2, 4), (2, 4))
    chosen = module.tiles_for  # before a candidate takes its place
    for name, (in_, outs) in GROUPS.items():
        run = prepare(in_, outs, rows)
        print(f"chosen: {chosen(rows, in_ // 64, outs)}")
        for out, blocks, split, number in product(heights, widths, (1, 2, 4, 8), warps):
            if in_ // 64 % (blocks * split) == 0:
                tiles = module.Tiles(out, blocks, split, number)
                _line(f"{name:8} {tiles}", partial(run, tiles))


def _jax_matvec(in_: int, outs: tuple[int, ...], rows: int) -> Callable[..., float]:
    import jax
    import jax.numpy as jnp

    from jaxsloth.kernels.nf4.contract import NF4, Nested
    from jaxsloth.kernels.nf4.pallas_matvec import matvec

    def weight(out: int) -> NF4:
        blocks = out * in_ // 64
        codes, absmax = (jax.random.bits(jax.random.key(n), (LAYERS, n), jnp.uint8) for n in (blocks * 32, blocks))
        nested = Nested(jnp.full((LAYERS, -(-blocks // 256)), 0.01), jnp.zeros(LAYERS), jnp.linspace(-1, 1, 256))
        return NF4(codes, absmax, nested, (out, in_))

    weights, x = [weight(out) for out in outs], jax.random.normal(jax.random.key(0), (rows, in_), jnp.bfloat16)

    def run(tiles: Any) -> float:
        def one(index: Any, x: Any) -> Any:
            y = matvec(x, weights, layer=index % LAYERS, tiles=tiles)
            return x + (1e-30 * y.sum(axis=1, keepdims=True)).astype(x.dtype)  # so that they follow one another

        work = jax.jit(lambda x: jax.lax.fori_loop(0, 2 * LAYERS, one, x))
        return best_ms(lambda: work(x), jax.block_until_ready)

    return run


def _torch_matvec(in_: int, outs: tuple[int, ...], rows: int) -> Callable[..., float]:
    import torch

    from jaxsloth.kernels.nf4 import matvec_triton
    from jaxsloth.kernels.nf4.contract import NF4, Nested

    def weight(out: int) -> NF4:
        blocks = out * in_ // 64
        codes, absmax = (torch.randint(256, (n,), dtype=torch.uint8, device="cuda") for n in (blocks * 32, blocks))
        levels = torch.full((-(-blocks // 256),), 0.01), torch.zeros(()), torch.linspace(-1, 1, 256)
        return NF4(codes, absmax, Nested(*(level.cuda() for level in levels)), (out, in_))

    layers = [[weight(out) for out in outs] for _ in range(LAYERS)]
    x = torch.randn(rows, in_, dtype=torch.bfloat16, device="cuda")

    def run(tiles: Any) -> float:
        matvec_triton.tiles_for = lambda *_: tiles
        matvec_triton.matvec(x, layers[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(2 * LAYERS):
                matvec_triton.matvec(x, layers[index % LAYERS])
        return best_ms(graph.replay, lambda _: torch.cuda.synchronize())

    return run


if __name__ == "__main__":
    app()
