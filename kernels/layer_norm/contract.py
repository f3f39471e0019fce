"""LayerNorm (Ba et al. 2016, arXiv:1607.06450): ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

``layer_norm(x, weight, bias=None, *, eps) -> [..., hidden]``
    x ``[..., hidden]``, weight and bias ``[hidden]``; var is the mean of squares around the mean. All is float32 inside and
    rounded once, as torch's own does it; the result has x's dtype.

Backward keeps x, the weight and two float32 numbers a row, mean and ``rstd``. dx, and what is trained of dweight and dbias;
with ``n = (x - mean)·rstd`` and ``g = dy·weight``: ``dx = rstd · (g - mean(g) - n · mean(g·n))``, ``dweight = Σ_rows dy·n``,
``dbias = Σ_rows dy``.

For the encoders (BERT, ModernBERT); no model uses it yet.
"""

from jaxsloth.kernels.registry import Implementation, Op, Target, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance

MAX_HIDDEN = 65536


def _kernel_refuses(target: Target) -> str | None:
    if target.sizes.get("hidden", 0) > MAX_HIDDEN:
        return f"holds one row in registers, and hidden={target.sizes['hidden']} is over {MAX_HIDDEN}"
    return needs_cuda(target)


LAYER_NORM = Op(
    "layer_norm",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.layer_norm.triton_kernel:layer_norm", _kernel_refuses),
        Implementation("torch", "torch", "jaxsloth.kernels.layer_norm.torch_ops:layer_norm"),
        Implementation("pallas", "jax", "jaxsloth.kernels.layer_norm.pallas_kernel:layer_norm", _kernel_refuses),
        Implementation("xla", "jax", "jaxsloth.kernels.layer_norm.xla_ops:layer_norm"),
    ),
)
OPS = (LAYER_NORM,)
TOLERANCES = {
    "float32": Tolerance(output=1e-6, gradient=2e-6),
    "bfloat16": Tolerance(output=6e-3, gradient=8e-3),
    "float16": Tolerance(output=8e-4, gradient=1e-3),
}
