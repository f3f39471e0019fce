"""Gated activation of the MLP (Shazeer 2020, arXiv:2002.05202): ``y = act(gate) * up``.

``gated_activation(gate, up, *, kind) -> [..., width]``
    gate and up ``[..., width]``, one dtype; kind is one of `KINDS`. act is computed in float32, rounded to the dtype, and
    then multiplied by up, as transformers does.

Backward keeps gate and up only: ``dgate = dy·up·act'(gate)``, ``dup = dy·act(gate)``.
"""

from jaxsloth.kernels.registry import Implementation, Op, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance

KINDS = ("silu", "gelu", "gelu_tanh", "relu")

GATED_ACTIVATION = Op(
    "gated_activation",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.gated_activation.triton_kernel:gated_activation", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.gated_activation.torch_ops:gated_activation"),
        Implementation("xla", "jax", "jaxsloth.kernels.gated_activation.xla_ops:gated_activation"),
    ),
)
OPS = (GATED_ACTIVATION,)
TOLERANCES = {
    "float32": Tolerance(output=1e-6, gradient=2e-6),
    "bfloat16": Tolerance(output=6e-3, gradient=8e-3),
    "float16": Tolerance(output=8e-4, gradient=1e-3),
}
