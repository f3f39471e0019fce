"""Scaled dot-product attention with grouped heads (Ainslie et al. 2023, arXiv:2305.13245), causal, windowed, packed.

``attention(q, k, v, *, scale, causal=True, window=None, soft_cap=None, q_segments=None, kv_segments=None, q_offset=0)
-> [batch, q_length, heads, head_dim]``
    q ``[batch, q_length, heads, head_dim]``; k and v ``[batch, kv_length, kv_heads, head_dim]``; heads is a multiple of
    kv_heads, and query head h reads key head ``h // (heads / kv_heads)``.
    Query i stands at slot ``q_offset + i`` (int, or an int32 scalar); key j at slot j. A key is visible when
    - causal: ``j <= slot(i)``;
    - window (an int): ``slot(i) - j < window``, and, when not causal, also ``j - slot(i) < window``;
    - segments (int32 ``[batch, q_length]``, ``[batch, kv_length]``; packed documents count from 1, 0 is padding): equal
      and not 0. kv_segments defaults to q_segments.
    A query that sees nothing (padding) gives zeros, and its gradients are zeros.
    soft_cap c (Gemma 2): scores become ``c·tanh(scores / c)`` before the mask.
    Scores and softmax are float32; probabilities are rounded to v's dtype before the second product.

Decoding on torch, in ``torch_ops`` and ``triton_kernel`` alike, with caches ``[batch, capacity, kv_heads, head_dim]`` and all
that changes from token to token on the device, so that a CUDA graph can hold it:
``append(q, k, v, tables, keys, values, slot) -> None``
    q ``[batch, heads·head_dim]``, k and v ``[batch, kv_heads·head_dim]``, of any row stride: one token a row. Turns q in place
    by tables (cos, sin) float32 ``[batch, half]``, or None to turn nothing, and writes the turned k, and v, to slot int64
    ``[1]`` of the caches.
``attend(q, keys, values, first, slot, *, scale, window=None, soft_cap=None) -> [batch, heads·head_dim]``
    Attention of the queries that stand at `slot` over the slots from first (int32 ``[batch]``) to slot, as above.

On JAX the same two, in ``xla_cached`` and ``pallas_cached`` alike (the latter for CUDA, where its `refuses` says None), except
that ``append`` returns (q turned, keys, values): in place where the caches are donated or carried by a loop. slot is an int32
scalar, and one beyond the capacity is taken for the last; tables may be ``[batch, 1, half]``, as `rope` takes them; a row
whose first is beyond slot gives zeros. What the other slots hold never matters, be it no number.

Backward: q, k, v, the output and one log-sum-exp a row are enough; the plain versions may keep what autograd keeps.

Sizes that a choice may hang on (`sizes_of`): head_dim, and soft_cap, 1 or 0. The project's own kernels stand back where there
is no soft cap: the libraries' attention is right there, and faster.
"""

from jaxsloth.kernels.registry import Implementation, Op, Target, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance

MAX_HEAD_DIM = 256


def sizes_of(head_dim: int, soft_cap: float | None) -> dict[str, int]:
    return {"head_dim": head_dim, "soft_cap": int(soft_cap is not None)}


def _flash_refuses(target: Target) -> str | None:
    if target.sizes.get("head_dim", 0) > MAX_HEAD_DIM:
        return f"holds tiles of whole heads in registers, and head_dim={target.sizes['head_dim']} is over {MAX_HEAD_DIM}"
    if target.sizes.get("soft_cap", 1) == 0:
        return "is for scores with a soft cap, and there is none: the library's is faster"
    return needs_cuda(target)


ATTENTION = Op(
    "attention",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.attention.flash_triton:attention", _flash_refuses),
        Implementation("torch", "torch", "jaxsloth.kernels.attention.torch_ops:attention"),
        Implementation("pallas", "jax", "jaxsloth.kernels.attention.pallas_flash:attention", _flash_refuses),
        Implementation("xla", "jax", "jaxsloth.kernels.attention.xla_ops:attention"),
    ),
)
OPS = (ATTENTION,)
TOLERANCES = {
    "float32": Tolerance(output=2e-6, gradient=5e-6),
    "bfloat16": Tolerance(output=8e-3, gradient=1.5e-2),
    "float16": Tolerance(output=1e-3, gradient=2e-3),
}
