"""A frozen linear layer with a low-rank update (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

``lora_matmul(x, base, lora_a=None, lora_b=None, *, scale=1.0, bias=None, dropout=None, layer=None) -> [..., out]``
    ``y = x·Wᵀ + bias + (dropout(x)·Aᵀ)·(scale·B)ᵀ``
    x ``[..., in]`` in the compute dtype, which is also the result's; base: a dense weight ``[out, in]`` (cast to the
    compute dtype where it differs) or an `NF4`; lora_a ``[r, in]`` and lora_b ``[out, r]`` float32, or both None;
    bias ``[out]`` or None. scale is folded into the float32 B before B's one cast. Products accumulate in float32.
    dropout: a `Dropout`, or None; x is then ``[batch, length, in]``.
    layer: int32 scalar (JAX): base's arrays carry a leading ``[layers]`` axis and this one is used.

The base is frozen: no gradient of it is formed, and the dequantized weight is never kept; backward rebuilds it from the
codes. Kept: x, base as given, A, B. With ``G = dy·(scale·B)``:
``dx = dy·W + mask(G·A)``, ``dA = Gᵀ·dropout(x)``, ``dB = scale · dyᵀ·(dropout(x)·Aᵀ)``, ``dbias = Σ dy``.
The dropout mask is drawn again in the backward, not kept. dA and dB are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxsloth.kernels.registry import Implementation, Op
from jaxsloth.kernels.tolerance import Tolerance

# Columns that written-out passes put behind rows are a multiple of this many (why: docs/decisions.md).
PAD = 64


def pad_for(rank: int) -> int:
    """Columns that hold `rank` of them."""
    return -(-rank // PAD) * PAD


@dataclass(frozen=True)
class Dropout:
    """What a LoRA dropout mask is drawn from: see kernels/dropout/contract.py."""

    rate: float
    key: Any  # uint32 [2] of the framework (torch: int64 holding the words)
    rows: Any  # int32 [batch]


LORA_MATMUL = Op(
    "lora_matmul",
    (
        Implementation("torch", "torch", "jaxsloth.kernels.lora_matmul.torch_ops:lora_matmul"),
        Implementation("xla", "jax", "jaxsloth.kernels.lora_matmul.xla_ops:lora_matmul"),
    ),
)
OPS = (LORA_MATMUL,)
TOLERANCES = {
    "float32": Tolerance(output=2e-6, gradient=4e-6),
    "bfloat16": Tolerance(output=8e-3, gradient=1.2e-2),
    "float16": Tolerance(output=1e-3, gradient=1.5e-3),
}
