"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4): ``y = x / sqrt(mean(x²) + eps) * (offset + weight)``.

``rms_norm(x, weight, *, eps, offset=0.0) -> [..., hidden]``
    x ``[..., hidden]``, weight ``[hidden]``; the result has x's dtype. The mean and the division are in float32.
    Cast order is transformers': with ``offset == 0`` (Llama) the normalised x is rounded to x's dtype and then multiplied
    by the weight; with another offset (Gemma, 1.0) the product is taken in float32 and rounded once.

Backward keeps x, the weight and one float32 reciprocal a row. dx and, where the weight is trained, dweight are formed;
with ``n = x·rstd`` and ``g = dy·(offset + weight)``: ``dx = rstd · (g - n · mean(g·n))``, ``dweight = Σ_rows dy·n``.
"""

from jaxsloth.kernels.registry import Implementation, Op, Target, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance

MAX_HIDDEN = 65536


def _kernel_refuses(target: Target) -> str | None:
    if target.sizes.get("hidden", 0) > MAX_HIDDEN:
        return f"holds one row in registers, and hidden={target.sizes['hidden']} is over {MAX_HIDDEN}"
    return needs_cuda(target)


RMS_NORM = Op(
    "rms_norm",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.rms_norm.triton_kernel:rms_norm", _kernel_refuses),
        Implementation("torch", "torch", "jaxsloth.kernels.rms_norm.torch_ops:rms_norm"),
        Implementation("pallas", "jax", "jaxsloth.kernels.rms_norm.pallas_kernel:rms_norm", _kernel_refuses),
        Implementation("xla", "jax", "jaxsloth.kernels.rms_norm.xla_ops:rms_norm"),
    ),
)
OPS = (RMS_NORM,)
TOLERANCES = {
    "float32": Tolerance(output=1e-6, gradient=2e-6),
    "bfloat16": Tolerance(output=6e-3, gradient=8e-3),
    "float16": Tolerance(output=8e-4, gradient=1e-3),
}
