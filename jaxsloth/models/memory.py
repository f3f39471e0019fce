"""How much memory a training pass needs, and which way of keeping activations fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxsloth.models.spec import ModelSpec

# Of the free memory, what may be filled with activations.
FILLED = 0.9


def fitting_mode(
    spec: ModelSpec, modes: Sequence[str], tokens: int, size: int, free_bytes: float, *, attends_once: bool = False
) -> str:
    """The first of `modes`, the fastest first, whose activations fit; the last one where none does."""
    needs = {mode: activation_bytes(spec, mode, tokens, size, attends_once=attends_once) for mode in modes}
    return first_fitting(needs, free_bytes)


def first_fitting(needs: Mapping[str, float], free_bytes: float) -> str:
    """The first mode, the fastest first, whose bytes fit; the last one where none does."""
    return next((mode for mode, need in needs.items() if need <= free_bytes * FILLED), list(needs)[-1])


def activation_bytes(spec: ModelSpec, mode: str, tokens: int, size: int, *, attends_once: bool = False) -> int:
    """About what the activations of a pass take on the device: those kept, and the most that one layer works with.

    attends_once: mode "full" keeps attention's output and the stream behind it too, as JAX does.
    """
    total = 0 if spec.lora is None else spec.lora.r * len(spec.lora.modules)  # the products with A, kept in every mode
    working = 0
    for layer in spec.layers:
        attention, mlp = layer.attention, layer.mlp
        q, kv = attention.heads * attention.head_dim, 2 * attention.kv_heads * attention.head_dim
        few = 2 * spec.hidden + 2 * q + kv
        full = 2 * spec.hidden + q if attends_once else spec.hidden
        kept = {"none": few + 2 * spec.hidden + 2 * mlp.width, "selective": few, "offload": 0, "full": full}
        total += kept[mode]
        working = max(working, 3 * mlp.width + 2 * few + 4 * spec.hidden)
    return tokens * size * (total + working)


def offloaded_bytes(spec: ModelSpec, tokens: int, size: int) -> int:
    """What mode "offload" sends to the host: both residual streams, q k v and attention's output of every layer."""
    widths = ((layer.attention.heads, layer.attention.kv_heads, layer.attention.head_dim) for layer in spec.layers)
    return tokens * size * sum(2 * spec.hidden + 2 * (heads + kv_heads) * dim for heads, kv_heads, dim in widths)
